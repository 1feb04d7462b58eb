"""Loaders for pictures without labels: random crops to learn from, and whole pictures by their numbers to compare on.

Order, share of each process and crops follow from the seed and the place in the run, as in
:mod:`~dge_recipes.data.loaders`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dge_recipes.classes import Classes
from dge_recipes.config import Config
from dge_recipes.data.identity import DataIdentity, identify_images
from dge_recipes.data.image_sets import ImageSet, plain_images, training_images
from dge_recipes.data.images import UNREADABLE, HeldOutImages
from dge_recipes.data.loaders import HeldOutData, TrainingData, loading
from dge_recipes.data.sampling import EpochSampler
from dge_recipes.data.section import ImageSource
from dge_recipes.errors import UserError

__all__ = ["NumberedImages", "build_picture_held_out", "build_picture_training", "numbers_of"]


class NumberedImages(Dataset[tuple[Tensor, int]]):
    """Held-out pictures with their numbers in the place of labels.

    Args:
        images: with labels, :data:`~dge_recipes.data.images.UNREADABLE` where a picture is blank.

    Attributes:
        source: of the pictures; None of those made in memory.
    """

    def __init__(self, images: Any) -> None:
        self.images = images
        self.source: ImageSource | None = getattr(images, "source", None)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image float32 [C, size, size] and its number k; of a blank one -1 - k."""
        image, label = self.images[index]
        return image, -1 - index if label == UNREADABLE else index

    def check_skipped(self, count: int) -> None:
        """End the run if too many pictures were skipped by all processes together; a UserError then."""
        if isinstance(self.images, HeldOutImages):
            self.images.check_skipped(count)


def numbers_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of pictures, and which of them are blank.

    Args:
        labels: int64 [B], as :class:`NumberedImages` has them.
    """
    blank = labels < 0
    return torch.where(blank, -1 - labels, labels), blank


def build_picture_training(config: Config, num_processes: int, outputs: Classes) -> TrainingData:
    """Build the training set, its order and its loader.

    Args:
        config: the run's configuration. An epoch takes ``data.crops`` random crops of every picture.
        num_processes: processes that really run, which decides the global batch.
        outputs: what the model tells apart. The pictures show none of it, as far as anybody has looked.

    Raises:
        UserError: data that is missing or unusable.
    """
    data, train = training_images(config), config.train
    # Above the number of pictures it begins again with the first one.
    draws = len(data.images) * getattr(config.data, "crops", 1)
    global_batch = train.batch_size * num_processes * train.accumulation_steps
    try:
        sampler = EpochSampler(draws, global_batch, train.seed, data.repeats)
    except UserError as error:
        raise UserError(f"{error}; data.crops takes several of each picture") from error
    loader = DataLoader(data.images, train.batch_size, sampler=sampler, drop_last=True, **loading(config))
    return TrainingData(loader, sampler, _identify(data, outputs))


def build_picture_held_out(config: Config, outputs: Classes) -> HeldOutData:
    """Build the held-out set and its loader, which yields images float32 [B, 3, size, size] and their numbers.

    Args:
        config: the ``data`` section, and how pictures are loaded.
        outputs: as for :func:`build_picture_training`.

    Raises:
        UserError: data that is missing or unusable.
    """
    data, size = plain_images(config, "val"), config.data.image_size
    loader = DataLoader(NumberedImages(data.images), config.eval.batch_size, **loading(config))
    shape = (data.channels, size, size)
    return HeldOutData(loader, len(data.images), outputs.count, shape, _identify(data, outputs))


def _identify(data: ImageSet, outputs: Classes) -> DataIdentity:
    source: ImageSource | None = getattr(data.images, "source", None)
    names = (str(number) if source is None else source.entry(number) for number in range(len(data.images)))
    return identify_images(((name, ()) for name in names), outputs)
