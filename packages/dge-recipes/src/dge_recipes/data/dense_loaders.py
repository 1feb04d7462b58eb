"""Loaders for dense prediction: images with the boxes and masks of objects, or with a class for every pixel.

Order, share of each process and augmentation follow from the seed and the place in the run, as in
:mod:`~dge_recipes.data.loaders`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from dge_recipes.classes import Classes, match_classes, tell_difference
from dge_recipes.config import Config
from dge_recipes.data.dense_targets import collate_lists, collate_stacked
from dge_recipes.data.image_sets import ImageSet
from dge_recipes.data.loaders import HeldOutData, TrainingData, loading
from dge_recipes.data.sampling import EpochSampler
from dge_recipes.errors import UserError

__all__ = ["build_detection_data", "build_detection_held_out", "build_detection_training"]
__all__ += ["build_segmentation_data", "build_segmentation_held_out", "build_segmentation_training"]


def build_detection_data(
    config: Config, num_processes: int, *, masks: bool = False
) -> tuple[TrainingData, HeldOutData]:
    """Build the training and the held-out set of a detector's run. Both hold the same classes.

    Batches are a list of images float32 [3, H, W] of any sizes, and a list of their targets
    (:func:`~dge_recipes.data.dense_targets.detection_target`), which for evaluation hold crowds too.

    Args:
        config: the run's configuration.
        num_processes: processes that really run, which decides the global batch.
        masks: targets hold the objects' masks too.

    Raises:
        UserError: data that is missing, unusable or of another task, or classes that differ.
    """
    training = build_detection_training(config, num_processes, masks=masks)
    return training, _beside(training, build_detection_held_out(config, masks=masks))


def build_detection_training(config: Config, num_processes: int, *, masks: bool = False) -> TrainingData:
    """Build a detector's training set; as :func:`build_detection_data`."""
    _check(config, "detection")
    data = config.data.detection_images("train", config.train.seed, Path(config.output.dir), masks=masks)
    return _training(config, num_processes, data, collate_lists)


def build_detection_held_out(
    config: Config, model: Classes | None = None, known: str = "the weights know", *, masks: bool = False
) -> HeldOutData:
    """Build a detector's held-out set.

    Args:
        config: the ``data`` section, and how images are loaded.
        model: the classes of a model that is to be evaluated, without the background; the data's must be the same.
            None: the model follows from the data.
        known: what comes before the model's classes in an error.
        masks: targets hold the objects' masks too.

    Returns:
        The set; ``num_classes`` does not count the background.

    Raises:
        UserError: as :func:`build_detection_data`, or other classes than the model's.
    """
    _check(config, "detection")
    data = config.data.detection_images("val", None, Path(config.output.dir), masks=masks)
    return _held_out(config, data, model, known)


def build_segmentation_data(config: Config, num_processes: int) -> tuple[TrainingData, HeldOutData]:
    """Build the training and the held-out set of a segmenter's run. Both hold the same classes.

    Training batches are images float32 [B, 3, S, S] and masks int64 [B, S, S]; those to evaluate are a list of images
    float32 [3, h, w] of any sizes, and a list of their targets
    (:func:`~dge_recipes.data.dense_targets.segmentation_target`), whose masks have the size of the file.

    Args:
        config: the run's configuration.
        num_processes: processes that really run, which decides the global batch.

    Raises:
        UserError: data that is missing, unusable or of another task, or classes that differ.
    """
    training = build_segmentation_training(config, num_processes)
    return training, _beside(training, build_segmentation_held_out(config))


def build_segmentation_training(config: Config, num_processes: int) -> TrainingData:
    """Build a segmenter's training set; as :func:`build_segmentation_data`."""
    _check(config, "segmentation")
    data = config.data.segmentation_images("train", config.train.seed, Path(config.output.dir))
    return _training(config, num_processes, data, collate_stacked)


def build_segmentation_held_out(
    config: Config, model: Classes | None = None, known: str = "the weights know"
) -> HeldOutData:
    """Build a segmenter's held-out set.

    Args:
        config: the ``data`` section, and how images are loaded.
        model: the classes of a model that is to be evaluated; the data's must be the same. None: the model follows
            from the data.
        known: what comes before the model's classes in an error.

    Raises:
        UserError: as :func:`build_segmentation_data`, or other classes than the model's.
    """
    _check(config, "segmentation")
    data = config.data.segmentation_images("val", None, Path(config.output.dir))
    return _held_out(config, data, model, known)


def _training(config: Config, num_processes: int, data: ImageSet, collate: Callable[[Any], Any]) -> TrainingData:
    train = config.train
    sampler = EpochSampler(
        len(data.images), train.batch_size * num_processes * train.accumulation_steps, train.seed, data.repeats
    )
    loader = DataLoader(
        data.images, train.batch_size, sampler=sampler, drop_last=True, collate_fn=collate, **loading(config)
    )
    return TrainingData(loader, sampler, data.identify())


def _held_out(config: Config, data: ImageSet, model: Classes | None, known: str) -> HeldOutData:
    identity, size = data.identify(), config.data.image_size
    if model is not None:
        shown = f"the held-out images of {getattr(config.data, 'root', config.data.name)} show"
        match = match_classes(model, identity.classes, (), known=known, shown=shown, ways_out=False)
        names = model.names, identity.classes.names
        if match.outputs is not None and names[0] is not None and names[1] is not None:
            raise UserError(tell_difference(known, names[0], shown, names[1]))
    loader = DataLoader(data.images, config.eval.batch_size, collate_fn=collate_lists, **loading(config))
    shape = (data.channels, size, size)
    return HeldOutData(loader, len(data.images), identity.classes.count, shape, identity)


def _beside(training: TrainingData, held_out: HeldOutData) -> HeldOutData:
    """The held-out set, once its classes are those of the training set."""
    first, second = training.identity.classes, held_out.identity.classes
    if first.names is not None and second.names is not None and first.names != second.names:
        raise UserError(tell_difference("the training images show", first.names, "the held-out ones", second.names))
    if first.count != second.count:
        raise UserError(f"got {first.count} training classes and {second.count} held-out ones; set data.num_classes")
    return held_out


def _check(config: Config, task: str) -> None:
    data = config.data
    if task not in data.tasks:
        raise UserError(f"data.name: got {data.name}, which serves {', '.join(data.tasks)}; expected data for {task}")
    if data.classes == "subset":
        raise UserError(f"data.classes: got subset; expected same or new for {task}")
