"""Typed configuration: one strict tree, YAML files, ``key=value`` overrides."""

from dge_recipes.config.files import config_path, launcher_path, list_configs, list_launchers
from dge_recipes.config.loading import dump_config, load_config
from dge_recipes.config.schema import (
    BudgetConfig,
    CheckpointConfig,
    Config,
    ConvertConfig,
    DigitsData,
    EvalConfig,
    ImageFolderData,
    MixingConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "BudgetConfig",
    "CheckpointConfig",
    "Config",
    "ConvertConfig",
    "DigitsData",
    "EvalConfig",
    "ImageFolderData",
    "MixingConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "ScheduleConfig",
    "TrainConfig",
    "config_path",
    "dump_config",
    "launcher_path",
    "list_configs",
    "list_launchers",
    "load_config",
]
