"""Speed and memory of models, eager and compiled, side by side on the same images."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dge_recipes.evaluation.speed import time_forwards

__all__ = ["Measurement", "measure", "percentile"]


@dataclass(frozen=True)
class Measurement:
    """One model, one way to run it, one batch size.

    Attributes:
        model: ``dense`` or ``DGE``.
        variant: ``eager`` or ``compiled``.
        batch: images per forward.
        images_per_second: of the median forward.
        p50_ms, p95_ms: latency of a forward, in milliseconds.
        memory_mib: the most that a forward needed beside weights and images, on CUDA; None elsewhere.
    """

    model: str
    variant: str
    batch: int
    images_per_second: float
    p50_ms: float
    p95_ms: float
    memory_mib: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(
    models: dict[str, nn.Module],
    images: Callable[[int], Tensor],
    batches: Sequence[int],
    *,
    backend: str | None,
    rounds: int,
    dtype: torch.dtype,
) -> list[Measurement]:
    """Time evaluation forwards; at each batch size all models alternate, so that all meet the same conditions.

    Args:
        models: by name, in evaluation mode on their device.
        images: makes a batch [B, C, H, W] of the given size on that device.
        batches: images per forward.
        backend: also time the models compiled by this backend of torch.compile; None: eager alone.
        rounds: timed forwards of each.
        dtype: float32, or what autocast computes in.
    """
    variants = {(name, "eager"): model for name, model in models.items()}
    if backend is not None:
        for name, model in models.items():
            compiled: Any = torch.compile(model, backend=backend, dynamic=True)
            variants[name, "compiled"] = compiled
    found = []
    for batch in batches:
        data = images(batch)
        runs = {"/".join(key): model for key, model in variants.items()}
        with _precision(data, dtype):
            memory = {name: _memory(model, data) for name, model in runs.items()}
            seconds = time_forwards(runs, [data], rounds)
        for (name, variant), key in zip(variants, runs, strict=True):
            times = seconds[key]
            p50 = statistics.median(times)
            numbers = (batch / p50, 1e3 * p50, 1e3 * percentile(times, 0.95))
            found.append(Measurement(name, variant, batch, *numbers, memory[key]))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of the values does not exceed, interpolated linearly."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _precision(images: Tensor, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is torch.float32 else torch.autocast(images.device.type, dtype)


def _memory(model: nn.Module, images: Tensor) -> float | None:
    if images.device.type != "cuda":
        return None
    with torch.inference_mode():
        model(images)  # compilation and workspaces are not the model's need
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        model(images)
        torch.cuda.synchronize(images.device)
    return round((torch.cuda.max_memory_allocated(images.device) - before) / 2**20, 1)
