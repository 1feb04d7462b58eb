"""Loaders for training and evaluation, ready for Accelerate."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dge_recipes.config import Config, DigitsData, RandomData, ShapesData
from dge_recipes.data.digits import NUM_CLASSES, TrainingDigits, UprightDigits
from dge_recipes.data.images import HeldOutImages, TrainingImages
from dge_recipes.data.random_images import RandomImages
from dge_recipes.data.sampling import EpochSampler
from dge_recipes.data.shapes import ShapeImages, TrainingShapes
from dge_recipes.data.sources.opening import check_same_classes, open_source
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
    train, repeats = _training_set(config)
    global_batch = config.train.batch_size * num_processes * config.train.accumulation_steps
    sampler = EpochSampler(len(train), global_batch, config.train.seed, repeats)
    loader = DataLoader(train, config.train.batch_size, sampler=sampler, drop_last=True, **_loading(config))
    return TrainingData(loader, sampler)


def build_held_out(config: Config) -> HeldOutData:
    """Build the held-out set and its loader.

    Raises:
        UserError: data that is missing or unusable.
    """
    data: Any
    if isinstance(config.data, DigitsData):
        data, classes, channels = UprightDigits(config.data), NUM_CLASSES, 1
    elif isinstance(config.data, RandomData):
        data, classes, channels = RandomImages(config.data), config.data.num_classes, config.data.channels
    elif isinstance(config.data, ShapesData):
        data, classes, channels = ShapeImages(config.data), config.data.num_classes, config.data.channels
    else:
        source = open_source(config.data, "val")
        data, classes, channels = HeldOutImages(source, config.data, Path(config.output.dir)), source.num_classes, 3
    loader = DataLoader(data, config.eval.batch_size, **_loading(config))
    size = config.data.image_size
    return HeldOutData(loader, len(data), classes, (channels, size, size))


def check_classes(training: TrainingData, held_out: HeldOutData) -> None:
    """Training and held-out labels must mean the same.

    Raises:
        UserError: they do not.
    """
    sets = training.loader.dataset, held_out.loader.dataset
    if isinstance(sets[0], TrainingImages) and isinstance(sets[1], HeldOutImages):
        check_same_classes(sets[0].source, sets[1].source)


def _training_set(config: Config) -> tuple[Any, int]:
    """The set, and how often an epoch draws each image."""
    data, seed = config.data, config.train.seed
    if isinstance(data, DigitsData):
        return TrainingDigits(data, seed), 1
    if isinstance(data, RandomData):
        return RandomImages(data), 1
    if isinstance(data, ShapesData):
        return TrainingShapes(data), 1
    source = open_source(data, "train")
    return TrainingImages(source, data, seed, Path(config.output.dir)), data.repeats


def _loading(config: Config) -> dict[str, Any]:
    workers = config.data.workers
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": worker_signals(),
    }
