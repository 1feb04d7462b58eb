"""Data sets, sampling and loaders.

The configuration needs the data sets' sections, and must not wait for PyTorch: what needs it is imported when it is
asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dge_recipes.data.dense_loaders import (
        build_detection_data,
        build_detection_held_out,
        build_detection_training,
        build_segmentation_data,
        build_segmentation_held_out,
        build_segmentation_training,
    )
    from dge_recipes.data.identity import DataIdentity
    from dge_recipes.data.loaders import (
        HeldOutData,
        TrainingData,
        build_data,
        build_held_out,
        build_training,
        check_classes,
    )
    from dge_recipes.data.sampling import Draw, EpochSampler

__all__ = [
    "DataIdentity",
    "Draw",
    "EpochSampler",
    "HeldOutData",
    "TrainingData",
    "build_data",
    "build_detection_data",
    "build_detection_held_out",
    "build_detection_training",
    "build_held_out",
    "build_segmentation_data",
    "build_segmentation_held_out",
    "build_segmentation_training",
    "build_training",
    "check_classes",
]

_PLACES = {"DataIdentity": "identity", "Draw": "sampling", "EpochSampler": "sampling"}
_PLACES |= {name: "dense_loaders" for name in __all__ if name.startswith(("build_detection", "build_segmentation"))}
# The others: loaders.


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'loaders')}"), name)
