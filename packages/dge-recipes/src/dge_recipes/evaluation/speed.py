"""Images per second of one or several models, compared fairly."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["images_per_second", "time_forwards"]


def time_forwards(
    models: Mapping[str, nn.Module], batches: Sequence[Tensor], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Time evaluation forwards of several models in alternating runs.

    Alternating, so that whatever else the machine does meets all of them alike; compare medians.

    Args:
        models: by name, on the batches' device; their modes are restored.
        batches: images [B, C, H, W] each, taken in turn, the same for every model.
        rounds: timed forwards of each model.
        warmup: forwards of each model before the timed ones.

    Returns:
        Seconds of each timed forward, by model.
    """
    modes = {name: model.training for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(warmup + rounds):
            images = batches[turn % len(batches)]
            for name, model in models.items():
                elapsed = _time_forward(model.eval(), images)
                if turn >= warmup:
                    seconds[name].append(elapsed)
    for name, model in models.items():
        model.train(modes[name])
    return seconds


def images_per_second(seconds: list[float], batch_size: int) -> float:
    """Throughput of the median forward."""
    return batch_size / statistics.median(seconds)


def _time_forward(model: nn.Module, images: Tensor) -> float:
    _synchronize(images)
    start = time.perf_counter()
    model(images)
    _synchronize(images)
    return time.perf_counter() - start


def _synchronize(images: Tensor) -> None:
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)
