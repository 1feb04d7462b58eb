"""Typed configuration: one strict tree, YAML files, ``key=value`` overrides."""

from dge_recipes.config.data_sets import (
    CifarData,
    DigitsData,
    HuggingFaceData,
    ImageData,
    ImageFolderData,
    INaturalistData,
    RandomData,
    TarData,
    WebDatasetData,
)
from dge_recipes.config.files import config_path, launcher_path, list_configs, list_launchers
from dge_recipes.config.loading import dump_config, load_config
from dge_recipes.config.schema import (
    BudgetConfig,
    CheckpointConfig,
    Config,
    ConvertConfig,
    DistillationConfig,
    EvalConfig,
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
    "CifarData",
    "Config",
    "ConvertConfig",
    "DigitsData",
    "DistillationConfig",
    "EvalConfig",
    "HuggingFaceData",
    "INaturalistData",
    "ImageData",
    "ImageFolderData",
    "MixingConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "RandomData",
    "ScheduleConfig",
    "TarData",
    "TrainConfig",
    "WebDatasetData",
    "config_path",
    "dump_config",
    "launcher_path",
    "list_configs",
    "list_launchers",
    "load_config",
]
