"""Loaders for training and evaluation, ready for Accelerate."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from dge_recipes.config import Config
from dge_recipes.data.image_sets import plain_images, training_images
from dge_recipes.data.images import HeldOutImages, TrainingImages
from dge_recipes.data.sampling import EpochSampler
from dge_recipes.data.sources.opening import check_same_classes
from dge_recipes.data.workers import worker_signals

__all__ = ["HeldOutData", "TrainingData", "build_held_out", "build_training", "check_classes"]


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
    data = training_images(config)
    global_batch = config.train.batch_size * num_processes * config.train.accumulation_steps
    sampler = EpochSampler(len(data.images), global_batch, config.train.seed, data.repeats)
    loader = DataLoader(data.images, config.train.batch_size, sampler=sampler, drop_last=True, **_loading(config))
    return TrainingData(loader, sampler)


def build_held_out(config: Config) -> HeldOutData:
    """Build the held-out set and its loader.

    Raises:
        UserError: data that is missing or unusable.
    """
    data = plain_images(config, "val")
    loader = DataLoader(data.images, config.eval.batch_size, **_loading(config))
    size = config.data.image_size
    return HeldOutData(loader, len(data.images), data.num_classes, (data.channels, size, size))


def check_classes(training: TrainingData, held_out: HeldOutData) -> None:
    """Training and held-out labels must mean the same.

    Raises:
        UserError: they do not.
    """
    sets = training.loader.dataset, held_out.loader.dataset
    if isinstance(sets[0], TrainingImages) and isinstance(sets[1], HeldOutImages):
        check_same_classes(sets[0].source, sets[1].source)


def _loading(config: Config) -> dict[str, Any]:
    workers = config.data.workers
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": worker_signals(),
    }
