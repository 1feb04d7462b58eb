"""Images per second of one or several models, compared fairly, and the machine that they were measured on."""

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

import dge_models
from dge_recipes.processes import on_main_process

__all__ = ["device_facts", "first_images", "images_per_second", "machine_facts", "measure_speed", "time_forwards"]


def time_forwards(
    models: Mapping[str, nn.Module], batches: Sequence[Any], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Time evaluation forwards of several models in alternating runs.

    Alternating, so that whatever else the machine does meets all of them alike; compare medians.

    Args:
        models: by name, on the batches' device; their modes are restored.
        batches: images [B, C, H, W] each, or a list of images, taken in turn, the same for every model.
        rounds: timed forwards of each model.
        warmup: forwards of each model before the timed ones.

    Returns:
        Seconds of each timed forward, by model.
    """
    modes = {name: model.training for name, model in models.items()}
    with torch.inference_mode():
        runs = {name: model.eval() for name, model in models.items()}
        seconds = dge_models.time_in_turns(runs, batches, rounds, warmup=warmup, device=batches[0][0].device)
    for name, model in models.items():
        model.train(modes[name])
    return seconds


def images_per_second(seconds: list[float], batch_size: int) -> float:
    """Throughput of the median forward."""
    return batch_size / statistics.median(seconds)


def device_facts(device: torch.device) -> dict[str, Any]:
    """What computes: the device, CPU threads, and the vector instructions of torch, on which rounding depends."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def machine_facts(accelerator: Accelerator) -> dict[str, Any]:
    """What ran: processes that really took part, device, precision and versions."""
    device = accelerator.device
    return {
        "num_processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        **device_facts(device),
        "mixed_precision": accelerator.mixed_precision,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "accelerate")},
    }


def measure_speed(
    model: nn.Module,
    data_set: Dataset[Any],
    batch_size: int,
    rounds: int,
    accelerator: Accelerator,
    batch: Callable[[Dataset[Any], int], Any] | None = None,
) -> float | None:
    """Images per second of evaluation forwards, measured in the main process while the others wait.

    Args:
        model: on the accelerator's device.
        data_set: whose first images make the batch.
        batch_size: images in the batch.
        rounds: timed forwards; 0 measures nothing.
        accelerator: of this run.
        batch: makes the batch, as :func:`first_images` does; None: that one.

    Returns:
        The same number in every process; None where `rounds` is 0.
    """
    if rounds == 0:
        return None

    def measure() -> float:
        images = send_to_device((batch or first_images)(data_set, batch_size), accelerator.device)
        with accelerator.autocast():
            seconds = time_forwards({"model": model}, [images], rounds)["model"]
        return images_per_second(seconds, len(images))

    return on_main_process(accelerator, measure)


def first_images(data_set: Dataset[Any], count: int) -> Tensor:
    """The first images of an evaluation set as one batch [<= count, C, H, W]."""
    available = min(count, len(data_set))  # type: ignore[arg-type]  # has __len__
    images: Tensor = default_collate([data_set[index][0] for index in range(available)])
    return images
