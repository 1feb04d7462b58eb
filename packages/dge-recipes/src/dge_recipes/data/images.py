"""Photographs as training and evaluation see them: augmented, and with a policy for unreadable files."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dge_recipes.data.decoding import in_one_line, naming
from dge_recipes.data.pixels import to_rgb
from dge_recipes.data.sampling import Draw
from dge_recipes.data.section import ImageData, ImageSource
from dge_recipes.data.transforms import Transform, evaluation_transform, training_transform
from dge_recipes.errors import UserError
from dge_recipes.randomness import derive_seed, isolated_seed

__all__ = [
    "UNREADABLE",
    "UNREADABLE_FILE",
    "HeldOutImages",
    "SkippedImages",
    "SourceImages",
    "TrainingImages",
    "evaluation_transform",
    "training_transform",
]

UNREADABLE = -1
UNREADABLE_FILE = "unreadable_images.txt"

_LOG = logging.getLogger(__name__)
_FEW = 10  # however small the set, so many may be skipped

_UNREADABLE = (ValueError, OSError)  # of the latter those that `naming` lets pass: the system's it does not
_SHORT_RUN = 20  # unreadable images in a row that training passes before it counts them

T = TypeVar("T")


class SkippedImages:
    """The images of a set that were skipped, by this process and by the data loading processes that work for it.

    The marks lie in shared memory, so that an image that several of them met counts once, and is told and listed
    once. Other processes of a run, and the run's earlier starts, have marks of their own.

    Args:
        num_images: in the set.
        share: of them that may be skipped, from 0 to 1; ten images always may.
        folder: where ``unreadable_images.txt`` lists them.
    """

    def __init__(self, num_images: int, share: float, folder: Path) -> None:
        self.path = folder / UNREADABLE_FILE
        self._share, self._marks = share, torch.zeros(num_images, dtype=torch.bool).share_memory_()
        # Rounded first: 0.29 of 100 is 28.999999999999996.
        self._limit = max(_FEW, math.floor(round(share * num_images, 6)))

    def add(self, index: int, reason: str) -> None:
        """Skip an image: tell and list it, unless it was met before.

        Raises:
            UserError: the list cannot be written.
        """
        if self._marks[index]:
            return
        self._marks[index] = True
        _LOG.warning("skipped: %s", reason)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(reason + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}") from error

    def check(self, count: int | None = None) -> None:
        """End the run if too many were skipped.

        Args:
            count: how many, where more is known than this process met; None: those that it met.

        Raises:
            UserError: more than may be.
        """
        skipped = int(self._marks.sum()) if count is None else count
        if skipped > self._limit:
            raise UserError(
                f"{skipped} of {len(self._marks)} images cannot be read, and data.max_unreadable={self._share:g} "
                f"allows {self._limit}; mend those that {self.path} lists, or raise data.max_unreadable"
            )


class NamedImages(Protocol):
    """What can be read, and told when it cannot."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """Which file an image is in."""

    def read(self, index: int) -> Image.Image:
        """Decode an image, in any mode. What is not a whole image raises what Pillow raises."""


class ReadingPolicy(Protocol):
    """The keys of a section that say how its images are read."""

    @property
    def exif(self) -> bool:
        """Turn images upright."""

    @property
    def unreadable(self) -> str:
        """Whether images that cannot be read end the run or are skipped."""

    @property
    def max_unreadable(self) -> float:
        """Share of the images that may be skipped."""


class SourceImages(Dataset[Any]):
    """Images of a source, those that cannot be read treated as the config says.

    Args:
        source: the images.
        config: the policy.
        folder: where ``unreadable_images.txt`` is written if it is needed.
    """

    def __init__(self, source: NamedImages, config: ReadingPolicy, folder: Path) -> None:
        self._named, self._upright = source, config.exif
        skips = config.unreadable == "skip"
        self.skipped = SkippedImages(len(source), config.max_unreadable, folder) if skips else None

    def __len__(self) -> int:
        return len(self._named)

    def picture(self, index: int) -> Image.Image | None:
        """An image as RGB; None if it cannot be decoded and the policy is to skip.

        Raises:
            UserError: it cannot be decoded and the policy is not to skip; or, whatever the policy, the machine
                failed to read it.
        """
        return self.readable(index, lambda: to_rgb(self._named.read(index), upright=self._upright))

    def readable(self, index: int, read: Callable[[], T]) -> T | None:
        """What `read` makes of an image; None if it cannot be decoded and the policy is to skip.

        Args:
            index: of the image.
            read: decodes its file, or what belongs to it.

        Raises:
            UserError: as :meth:`picture`.
        """
        try:
            with naming(self._named.name(index)):
                return read()
        except UserError:
            raise
        except _UNREADABLE as error:
            reason = f"{self._named.name(index)} cannot be read as an image: {in_one_line(error)}"
            if self.skipped is None:
                hint = "replace it, or set data.unreadable=skip to go on without it"
                raise UserError(f"{reason}; {hint}") from error
        self.skipped.add(index, reason)
        return None

    def next_readable(self, start: int, read: Callable[[int], T | None]) -> tuple[int, T]:
        """The first image from one on, and round again, that can be read; the policy is to skip the others.

        Args:
            start: the first that may be taken.
            read: what is wanted of an image; None if it cannot be read.

        Raises:
            UserError: too many were skipped, or none can be read.
        """
        for offset in range(len(self)):
            index = (start + offset) % len(self)
            found = read(index)
            # A short run is passed first: that none of a small set can be read is the better word.
            if self.skipped is not None and (offset >= _SHORT_RUN or (offset and found is not None)):
                self.skipped.check()
            if found is not None:
                return index, found
        where = "" if self.skipped is None else f"; see {self.skipped.path}"
        raise UserError(f"none of the {len(self)} training images can be read{where}")

    def check_skipped(self, count: int | None = None) -> None:
        """End the run if too many images were skipped.

        Args:
            count: how many by all processes together; None: those that this one met.

        Raises:
            UserError: more than ``data.max_unreadable`` allows.
        """
        if self.skipped is not None:
            self.skipped.check(count)


class _Images(SourceImages):
    """Images of classes, transformed.

    Args:
        source: the images.
        config: the policy.
        transform: from a picture to a tensor.
        folder: where ``unreadable_images.txt`` is written if it is needed.
    """

    def __init__(self, source: ImageSource, config: ImageData, transform: Transform, folder: Path) -> None:
        super().__init__(source, config, folder)
        self.source, self.transform = source, transform

    def transformed(self, picture: Image.Image, index: int) -> Tensor:
        """The tensor that the transform makes of an image.

        Raises:
            UserError: a step of it fails on this picture.
        """
        with naming(self.source.name(index)):
            return self.transform(picture)


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
        """Image float32 [3, size, size], normalised, and its label.

        Raises:
            UserError: an image cannot be used, or too many were skipped.
        """
        index, picture = self.next_readable(draw.image, self.picture)
        with isolated_seed(derive_seed(self.seed, "augment", draw.epoch, draw.position)):
            return self.transformed(picture, index), self.source.label(index)


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
        """Image float32 [3, size, size], normalised, and its label.

        Raises:
            UserError: an image cannot be used, or too many were skipped.
        """
        picture = self.picture(index)
        if picture is None:
            self.check_skipped()
            return torch.zeros(self._blank), UNREADABLE
        return self.transformed(picture, index), self.source.label(index)
