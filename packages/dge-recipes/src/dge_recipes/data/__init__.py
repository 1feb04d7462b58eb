"""Data sets, sampling, mixing and loaders."""

from dge_recipes.data.loaders import HeldOutData, TrainingData, build_held_out, build_training, check_classes
from dge_recipes.data.mixing import build_mixing
from dge_recipes.data.sampling import Draw, EpochSampler

__all__ = [
    "Draw",
    "EpochSampler",
    "HeldOutData",
    "TrainingData",
    "build_held_out",
    "build_mixing",
    "build_training",
    "check_classes",
]
