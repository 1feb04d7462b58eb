"""Loaders for training and evaluation, ready for Accelerate."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from dge_recipes.config.schema import Config, DigitsData
from dge_recipes.data.digits import NUM_CLASSES, HeldOutDigits, TrainingDigits
from dge_recipes.data.imagefolder import TrainingFolder, open_held_out, open_training
from dge_recipes.data.sampling import EpochSampler

__all__ = ["HeldOutData", "TrainingData", "build_held_out", "build_training"]


@dataclass(frozen=True)
class TrainingData:
    """Training images: the loader, which ``accelerator.prepare`` deals to the processes, and the order."""

    loader: DataLoader[Any]
    sampler: EpochSampler


@dataclass(frozen=True)
class HeldOutData:
    """Held-out images: the loader, and what a model must know of them.

    Attributes:
        image_shape: (channels, height, width).
    """

    loader: DataLoader[Any]
    num_images: int
    num_classes: int
    image_shape: tuple[int, int, int]


def build_training(config: Config, num_processes: int) -> TrainingData:
    """Build the training set, its order and its loader.

    Args:
        config: the run's configuration.
        num_processes: processes that really run, which decides the global batch.

    Raises:
        UserError: data that is missing or unusable.
    """
    train: TrainingDigits | TrainingFolder
    if isinstance(config.data, DigitsData):
        train, repeats = TrainingDigits(config.data, config.train.seed), 1
    else:
        train, repeats = open_training(config.data, config.train.seed), config.data.repeats
    global_batch = config.train.batch_size * num_processes * config.train.accumulation_steps
    sampler = EpochSampler(len(train), global_batch, config.train.seed, repeats)
    loader = DataLoader(train, config.train.batch_size, sampler=sampler, drop_last=True, **_loading(config))
    return TrainingData(loader, sampler)


def build_held_out(config: Config) -> HeldOutData:
    """Build the held-out set and its loader.

    Raises:
        UserError: data that is missing or unusable.
    """
    held_out: Any
    if isinstance(config.data, DigitsData):
        held_out, classes, channels = HeldOutDigits(config.data), NUM_CLASSES, 1
    else:
        held_out = open_held_out(config.data)
        classes, channels = len(held_out.classes), 3
    loader = DataLoader(held_out, config.eval.batch_size, **_loading(config))
    size = config.data.image_size
    return HeldOutData(loader, len(held_out), classes, (channels, size, size))


def _loading(config: Config) -> dict[str, Any]:
    workers = config.data.workers
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
