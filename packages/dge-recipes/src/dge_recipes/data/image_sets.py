"""The images of every kind of ``data.name``, augmented for training or plain."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed

from dge_recipes.classes import Classes
from dge_recipes.config import Config
from dge_recipes.data.identity import DataIdentity, identify
from dge_recipes.data.images import HeldOutImages, TrainingImages
from dge_recipes.data.section import ImageData, ImageSource, Part
from dge_recipes.errors import UserError

__all__ = ["ImageSet", "check_same_classes", "identify_labels", "is_main_process"]
__all__ += ["open_source", "plain_images", "training_images"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """A data set of (image [channels, size, size], label), and what a model must know of it.

    Attributes:
        identify: tells its classes, and which images it holds; reads the whole list of images through.
        repeats: How often an epoch draws each image.
    """

    images: Any
    channels: int
    identify: Callable[[], DataIdentity]
    repeats: int = 1


def training_images(config: Config) -> ImageSet:
    """The training images, augmented: indexed by a :class:`~dge_recipes.data.Draw`.

    Raises:
        UserError: data that is missing or unusable.
    """
    data, seed = config.data, config.train.seed
    if not isinstance(data, ImageData):
        return data.images("train", seed)
    source = open_source(data, "train")
    images = TrainingImages(source, data, seed, Path(config.output.dir))
    return ImageSet(images, 3, lambda: _identify_source(source), data.repeats)


def plain_images(config: Config, part: Part, *, counted: bool = True) -> ImageSet:
    """The images of a part, resized and cropped but not augmented: indexed by position.

    Args:
        config: whose ``data`` section says which.
        part: training or held-out images.
        counted: ``data.num_classes`` must be met.

    Raises:
        UserError: data that is missing or unusable.
    """
    data = config.data
    if not isinstance(data, ImageData):
        return data.images(part)
    source = open_source(data, part, counted=counted)
    return ImageSet(HeldOutImages(source, data, Path(config.output.dir)), 3, lambda: _identify_source(source))


def open_source(config: ImageData, part: Part, *, counted: bool = True) -> ImageSource:
    """The training or the held-out images. The main process warns of files that are left out, in one line.

    Args:
        config: the ``data`` section.
        part: which of them.
        counted: ``data.num_classes`` must be met; False where the classes' names are compared instead.

    Raises:
        UserError: they are not there, cannot be used, or have another number of classes than the config says.
    """
    source = config.open(part)
    if source.left_out.total() and is_main_process():
        _LOG.warning("%s", source.left_out.told(part))
    counted = counted and config.labelled
    if counted and config.num_classes is not None and source.num_classes != config.num_classes:
        raise UserError(
            f"{config.root} ({part}) has {source.num_classes} classes; data.num_classes says {config.num_classes}"
        )
    return source


def is_main_process() -> bool:
    """Whether this process is the one that speaks for all."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def check_same_classes(train: ImageSource, held_out: ImageSource) -> None:
    """Training and held-out labels must mean the same.

    Raises:
        UserError: they do not.
    """
    first, second = train.classes, held_out.classes
    where = f"{train.name(0)} and {held_out.name(0)}"
    if first is not None and second is not None and first != second:
        only = sorted(set(first) ^ set(second))
        differ = f"differ in {only[:3]}" if only else "have them in another order"
        hint = "; data.classes=subset evaluates on those of val/ alone" if only and set(second) < set(first) else ""
        raise UserError(f"train/ and val/ must hold the same classes, but {differ} ({where}){hint}")
    if train.num_classes != held_out.num_classes:
        counts = f"{train.num_classes} training classes and {held_out.num_classes} held-out ones"
        raise UserError(f"got {counts} ({where}); set data.num_classes")


def identify_labels(labels: Iterable[int], classes: Classes) -> DataIdentity:
    """Tell images by their number alone."""
    return identify(((str(number), label) for number, label in enumerate(labels)), classes)


def _identify_source(source: ImageSource) -> DataIdentity:
    entries = ((source.entry(index), source.label(index)) for index in range(len(source)))
    names = None if source.classes is None else tuple(source.classes)
    return identify(entries, Classes(source.num_classes, names))
