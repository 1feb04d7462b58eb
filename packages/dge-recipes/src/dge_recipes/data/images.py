"""Photographs as training and evaluation see them: augmented, and with a policy for unreadable files."""

import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from dge_recipes.config.data_sets import ImageData
from dge_recipes.data.pixels import to_rgb
from dge_recipes.data.sampling import Draw
from dge_recipes.data.sources import ImageSource
from dge_recipes.errors import UserError
from dge_recipes.randomness import derive_seed, isolated_seed

__all__ = [
    "UNREADABLE",
    "UNREADABLE_FILE",
    "HeldOutImages",
    "TrainingImages",
    "evaluation_transform",
    "training_transform",
]

UNREADABLE = -1
UNREADABLE_FILE = "unreadable_images.txt"

_LOG = logging.getLogger(__name__)
_DECODING = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
Transform = Callable[[Image.Image], Tensor]


def training_transform(config: ImageData) -> Transform:
    """Timm's training transform for this config: random crop, flip, augmentation policy, erasing.

    Raises:
        UserError: timm does not know the policy.
    """
    try:
        transform: Transform = create_transform(
            config.image_size,
            is_training=True,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            re_prob=config.random_erasing,
            re_mode="pixel",
            mean=config.mean,
            std=config.std,
        )
    except (AssertionError, LookupError, ValueError) as error:
        expected = "expected a policy of timm's, such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0"
        raise UserError(f"data.auto_augment: got {config.auto_augment!r}, {expected}") from error
    return transform


def evaluation_transform(config: ImageData) -> Transform:
    """Timm's evaluation transform: resize the short side, crop the centre, normalise."""
    interpolation = "bicubic" if config.interpolation == "random" else config.interpolation
    transform: Transform = create_transform(
        config.image_size,
        interpolation=interpolation,
        crop_pct=config.crop_pct,
        mean=config.mean,
        std=config.std,
    )
    return transform


class _Images(Dataset[tuple[Tensor, int]]):
    """Images of a source, those that cannot be read treated as the config says.

    Args:
        source: the images.
        config: the policy.
        transform: from a picture to a tensor.
        folder: where ``unreadable_images.txt`` is written if it is needed.
    """

    def __init__(self, source: ImageSource, config: ImageData, transform: Transform, folder: Path) -> None:
        self.source, self.skips, self.transform = source, config.unreadable == "skip", transform
        self._list, self._listed = folder / UNREADABLE_FILE, set[int]()

    def __len__(self) -> int:
        return len(self.source)

    def picture(self, index: int) -> Image.Image | None:
        """An image as RGB; None if it cannot be read and the policy is to skip.

        Raises:
            UserError: it cannot be read and the policy is not to skip.
        """
        try:
            return to_rgb(self.source.read(index))
        except _DECODING as error:
            reason = f"{self.source.name(index)} cannot be read as an image: {' '.join(str(error).split())}"
            if not self.skips:
                hint = "replace it, or set data.unreadable=skip to go on without it"
                raise UserError(f"{reason}; {hint}") from error
        if index not in self._listed:
            self._listed.add(index)
            _LOG.warning("skipped: %s", reason)
            self._note(reason)
        return None

    def _note(self, line: str) -> None:
        """Append to the list; every process has its own memory, so lines may occur several times."""
        try:
            self._list.parent.mkdir(parents=True, exist_ok=True)
            with self._list.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._list}: {error}") from error


class TrainingImages(_Images):
    """Images augmented by a randomness that (seed, epoch, position) fixes, whichever worker draws them.

    Args:
        source: the images.
        config: augmentation, and the policy for unreadable images. Skipping takes the next readable image of the
            source instead, which depends on the files alone: batches keep their size, and runs repeat exactly.
        seed: the run's seed.
        folder: the run's.
    """

    def __init__(self, source: ImageSource, config: ImageData, seed: int, folder: Path) -> None:
        super().__init__(source, config, training_transform(config), folder)
        self.seed = seed

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        """Image float32 [3, size, size], normalised, and its label."""
        for offset in range(len(self)):
            index = (draw.image + offset) % len(self)
            picture = self.picture(index)
            if picture is not None:
                with isolated_seed(derive_seed(self.seed, "augment", draw.epoch, draw.position)):
                    return self.transform(picture), self.source.label(index)
        raise UserError(f"none of the {len(self)} training images can be read; see {self._list}")


class HeldOutImages(_Images):
    """Images as evaluation sees them.

    Args:
        source: the images.
        config: size and resizing, and the policy for unreadable images. Skipping gives a blank image with the label
            :data:`UNREADABLE`, which evaluation leaves out and counts.
        folder: the run's.
    """

    def __init__(self, source: ImageSource, config: ImageData, folder: Path) -> None:
        super().__init__(source, config, evaluation_transform(config), folder)
        self._blank = (3, config.image_size, config.image_size)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image float32 [3, size, size], normalised, and its label."""
        picture: Any = self.picture(index)
        if picture is None:
            return torch.zeros(self._blank), UNREADABLE
        return self.transform(picture), self.source.label(index)
