"""How much faster the dynamic model is than the dense one, measured side by side."""

import statistics
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from dge_recipes.evaluation import first_images, images_per_second, time_forwards

__all__ = ["Comparison", "compare_speed"]

_ROUNDS = 40


@dataclass(frozen=True)
class Comparison:
    """Two models timed on the same batches.

    Attributes:
        dense, dge: images per second of the median forward.
        speedup: median seconds of the dense model over those of the DGE model.
        rounds: timed forwards of each.
    """

    dense: float
    dge: float
    speedup: float
    rounds: int


def compare_speed(dense: nn.Module, dge: nn.Module, data_set: Dataset[Any], batch_size: int) -> Comparison:
    """Time evaluation forwards of both models in alternation, in this process.

    Args:
        dense: the dense model, on the CPU or an accelerator.
        dge: the dynamic one, on the same device.
        data_set: held-out images; whole batches of them are used in turn.
        batch_size: images per forward.
    """
    device = next(dge.parameters()).device
    images = first_images(data_set, len(data_set)).to(device)  # type: ignore[arg-type]  # has __len__
    batches = [batch for batch in images.split(batch_size) if len(batch) == batch_size] or [images]
    seconds = time_forwards({"dense": dense, "dge": dge}, batches, _ROUNDS)
    return Comparison(
        dense=images_per_second(seconds["dense"], len(batches[0])),
        dge=images_per_second(seconds["dge"], len(batches[0])),
        speedup=statistics.median(seconds["dense"]) / statistics.median(seconds["dge"]),
        rounds=_ROUNDS,
    )
