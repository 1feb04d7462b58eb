"""Small recipes of detection and segmentation: scenes of 64 pixels, a network that takes milliseconds."""

from pathlib import Path
from typing import Any

from dge_recipes.config import Config
from dge_recipes.config.loading import build_config, parse_yaml

__all__ = ["dense_config", "dense_tree"]

_PYRAMID = {"embed_dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "img_size": 64}
_VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
_MODELS = {
    "pyramid": {"name": "pvt_dge_s124_tiny_256", "kwargs": _PYRAMID},
    "dense": {"name": "pvt_tiny_256", "kwargs": _PYRAMID},
    "vit": {"name": "deit_tiny_patch16_224", "kwargs": _VIT, "convert": {"splits": [2, 1]}},
}


def dense_tree(kind: str, folder: Path, model: str = "pyramid") -> dict[str, Any]:
    """A recipe as its YAML has it.

    Args:
        kind: of the head; the task follows.
        folder: the run's.
        model: ``pyramid``, its twin ``dense``, or ``vit``, converted.
    """
    segments = kind in {"semantic_fpn", "upernet"}
    return {
        "task": "segmentation" if segments else "detection",
        "model": _MODELS[model],
        "head": {"kind": kind, "channels": 64 if segments else 16},
        "data": {"name": "scenes", "image_size": 64, "num_images": 32, "held_out_images": 10, "num_classes": 3},
        "optim": {"name": "adamw", "lr": 1e-3},
        "schedule": {"min_lr": 0.0},
        "train": {"epochs": 2, "batch_size": 4, "log_every": 1, "device": "cpu"},
        "eval": {"batch_size": 4, "timing_rounds": 0},
        "output": {"dir": str(folder), "trackers": []},
    }


def dense_config(kind: str, folder: Path, *overrides: str, model: str = "pyramid") -> Config:
    """The same, with ``section.key=value`` applied."""
    tree = dense_tree(kind, folder, model)
    for override in overrides:
        key, _, value = override.partition("=")
        *sections, leaf = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = parse_yaml(value, override)
    return build_config(tree)
