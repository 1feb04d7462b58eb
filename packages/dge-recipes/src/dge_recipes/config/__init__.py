"""Typed configuration: one strict tree, YAML files, ``key=value`` overrides."""

from dge_recipes.config.loading import (
    config_path,
    dump_config,
    launcher_path,
    list_configs,
    list_launchers,
    load_config,
)
from dge_recipes.config.schema import (
    BudgetConfig,
    CheckpointConfig,
    Config,
    ConvertConfig,
    DistillationConfig,
    EvalConfig,
    HeadConfig,
    MixingConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    ScheduleConfig,
    StudentConfig,
    TrainConfig,
)
from dge_recipes.config.task_keys import need_classification
from dge_recipes.data.cifar import CifarData
from dge_recipes.data.coco import CocoData
from dge_recipes.data.folder import ImageFolderData
from dge_recipes.data.generated import DigitsData, RandomData, ScenesData, ShapesData
from dge_recipes.data.huggingface import HuggingFaceData
from dge_recipes.data.inaturalist import INaturalistData
from dge_recipes.data.pictures import PicturesData
from dge_recipes.data.section import ImageData, PhotographData
from dge_recipes.data.segmentation_folder import SegmentationFolderData
from dge_recipes.data.tar import TarData
from dge_recipes.data.webdataset import WebDatasetData

__all__ = [
    "BudgetConfig",
    "CheckpointConfig",
    "CifarData",
    "CocoData",
    "Config",
    "ConvertConfig",
    "DigitsData",
    "DistillationConfig",
    "EvalConfig",
    "HeadConfig",
    "HuggingFaceData",
    "INaturalistData",
    "ImageData",
    "ImageFolderData",
    "MixingConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "PhotographData",
    "PicturesData",
    "RandomData",
    "ScenesData",
    "ScheduleConfig",
    "SegmentationFolderData",
    "ShapesData",
    "StudentConfig",
    "TarData",
    "TrainConfig",
    "WebDatasetData",
    "config_path",
    "dump_config",
    "launcher_path",
    "list_configs",
    "list_launchers",
    "load_config",
    "need_classification",
]
