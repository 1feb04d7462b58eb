"""The images of every kind of ``data.name``, augmented for training or plain."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dge_recipes.config import Config, DigitsData, RandomData, ShapesData
from dge_recipes.data.digits import NUM_CLASSES, TrainingDigits, UprightDigits
from dge_recipes.data.images import HeldOutImages, TrainingImages
from dge_recipes.data.random_images import RandomImages
from dge_recipes.data.shapes import ShapeImages, TrainingShapes
from dge_recipes.data.sources import open_source

__all__ = ["ImageSet", "plain_images", "training_images"]


@dataclass(frozen=True)
class ImageSet:
    """A data set of (image [channels, size, size], label), and what a model must know of it.

    Attributes:
        repeats: How often an epoch draws each image.
    """

    images: Any
    num_classes: int
    channels: int
    repeats: int = 1


def training_images(config: Config) -> ImageSet:
    """The training images, augmented: indexed by a :class:`~dge_recipes.data.Draw`.

    Raises:
        UserError: data that is missing or unusable.
    """
    data, seed = config.data, config.train.seed
    if isinstance(data, DigitsData):
        return ImageSet(TrainingDigits(data, seed), NUM_CLASSES, 1)
    if isinstance(data, RandomData):
        return ImageSet(RandomImages(data), data.num_classes, data.channels)
    if isinstance(data, ShapesData):
        return ImageSet(TrainingShapes(data), data.num_classes, data.channels)
    source = open_source(data, "train")
    return ImageSet(TrainingImages(source, data, seed, Path(config.output.dir)), source.num_classes, 3, data.repeats)


def plain_images(config: Config, part: Literal["train", "val"]) -> ImageSet:
    """The images of a part, resized and cropped but not augmented: indexed by position.

    Raises:
        UserError: data that is missing or unusable.
    """
    data, held_out = config.data, part == "val"
    if isinstance(data, DigitsData):
        return ImageSet(UprightDigits(data, held_out=held_out), NUM_CLASSES, 1)
    if isinstance(data, RandomData):
        return ImageSet(RandomImages(data), data.num_classes, data.channels)
    if isinstance(data, ShapesData):
        return ImageSet(ShapeImages(data, held_out=held_out), data.num_classes, data.channels)
    source = open_source(data, part)
    return ImageSet(HeldOutImages(source, data, Path(config.output.dir)), source.num_classes, 3)
