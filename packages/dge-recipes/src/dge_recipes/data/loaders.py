"""Loaders for training and evaluation, ready for Accelerate."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from dge_recipes.classes import Classes, ClassMatch, match_classes
from dge_recipes.config import Config
from dge_recipes.data.identity import DataIdentity
from dge_recipes.data.image_sets import check_same_classes, plain_images, training_images
from dge_recipes.data.images import HeldOutImages, TrainingImages
from dge_recipes.data.sampling import EpochSampler
from dge_recipes.data.workers import worker_context, worker_signals
from dge_recipes.errors import UserError

__all__ = ["HeldOutData", "TrainingData", "build_data", "build_held_out", "build_training", "check_classes", "loading"]


@dataclass(frozen=True)
class TrainingData:
    """Training images: the loader, which ``accelerator.prepare`` deals to the processes, and the order.

    Attributes:
        identity: their classes, and which images they are.
    """

    loader: DataLoader[Any]
    sampler: EpochSampler
    identity: DataIdentity


@dataclass(frozen=True)
class HeldOutData:
    """Held-out images: the loader, and what a model must know of them.

    Attributes:
        num_classes: outputs of the model.
        image_shape: (channels, height, width).
        identity: their classes, and which images they are.
        match: how their labels meet the model's outputs; None where label k is output k, unchecked.
    """

    loader: DataLoader[Any]
    num_images: int
    num_classes: int
    image_shape: tuple[int, int, int]
    identity: DataIdentity
    match: ClassMatch | None = None


def build_data(config: Config, num_processes: int) -> tuple[TrainingData, HeldOutData]:
    """Build the training and the held-out set of a run. Both hold the same classes.

    With ``data.classes=subset`` the held-out images may lack some, and are told from each other alone.

    Args:
        config: the run's configuration.
        num_processes: processes that really run, which decides the global batch.

    Raises:
        UserError: data that is missing or unusable, or classes that differ.
    """
    training = build_training(config, num_processes)
    if config.data.classes == "subset":
        return training, build_held_out(config, training.identity.classes, "the training images show")
    held_out = build_held_out(config)
    check_classes(training, held_out)
    return training, held_out


def build_training(config: Config, num_processes: int) -> TrainingData:
    """Build the training set, its order and its loader.

    Args:
        config: the run's configuration.
        num_processes: processes that really run, which decides the global batch.

    Raises:
        UserError: data that is missing or unusable, or without labels.
    """
    _need_labels(config)
    data = training_images(config)
    global_batch = config.train.batch_size * num_processes * config.train.accumulation_steps
    sampler = EpochSampler(len(data.images), global_batch, config.train.seed, data.repeats)
    loader = DataLoader(data.images, config.train.batch_size, sampler=sampler, drop_last=True, **loading(config))
    return TrainingData(loader, sampler, data.identify())


def build_held_out(config: Config, model: Classes | None = None, known: str = "the weights know") -> HeldOutData:
    """Build the held-out set and its loader.

    Args:
        config: the ``data`` section, and how images are loaded.
        model: the classes of a model that is to be evaluated, which the labels are matched with; None: the model
            follows from the data.
        known: what comes before the model's classes in an error.

    Raises:
        UserError: data that is missing, unusable or without labels, or of other classes than the model's.
    """
    _need_labels(config)
    subset = config.data.classes == "subset"
    # Names say more than their number does, and of a subset there are fewer.
    counted = not subset and (model is None or model.names is None)
    data = plain_images(config, "val", counted=counted)
    identity, match = data.identify(), None
    if model is not None:
        shown = f"the held-out images of {getattr(config.data, 'root', config.data.name)} show"
        match = match_classes(model, identity.classes, identity.occurring, subset=subset, known=known, shown=shown)
    loader = DataLoader(data.images, config.eval.batch_size, **loading(config))
    size = config.data.image_size
    num_classes = identity.classes.count if model is None else model.count
    return HeldOutData(loader, len(data.images), num_classes, (data.channels, size, size), identity, match)


def check_classes(training: TrainingData, held_out: HeldOutData) -> None:
    """Training and held-out labels must mean the same.

    Raises:
        UserError: they do not.
    """
    sets = training.loader.dataset, held_out.loader.dataset
    if isinstance(sets[0], TrainingImages) and isinstance(sets[1], HeldOutImages):
        check_same_classes(sets[0].source, sets[1].source)


def _need_labels(config: Config) -> None:
    if not config.data.labelled:
        raise UserError(
            f"data.name: got {config.data.name}, which have no labels; training and evaluation expect a data set with "
            "classes, such as imagefolder (dge-compress takes pictures)"
        )


def loading(config: Config) -> dict[str, Any]:
    """Arguments for ``DataLoader`` that all loaders share: the data loading processes, and memory for copies."""
    workers = config.data.workers
    return {
        "num_workers": workers,
        "multiprocessing_context": worker_context() if workers > 0 else None,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": worker_signals(),
    }
