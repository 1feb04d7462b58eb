"""Images and the index masks that belong to them, found by the names of their files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dge_recipes.data.decoding import decode
from dge_recipes.data.dense_targets import IGNORED
from dge_recipes.data.image_files import LeftOut, extension, image_extensions, visible_files
from dge_recipes.data.section import Part
from dge_recipes.data.segmentation_folder import SegmentationFolderData
from dge_recipes.errors import UserError

__all__ = ["MaskFiles", "read_class_names"]

_SHOWN = 3
_WRONG = -1
_INDEX_MODES = {"1", "L", "P"}  # what else counts is as Pillow's I;16 and I


def read_class_names(config: SegmentationFolderData) -> tuple[str, ...] | None:
    """The names of the classes, if a file has them.

    Raises:
        UserError: it cannot be read, or has another number of names than the config says, or one twice.
    """
    if config.class_names is None:
        return None
    file = config.folder / config.class_names
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.class_names: {file} cannot be read: {error}") from error
    if not 1 <= len(names) <= IGNORED:
        raise UserError(f"data.class_names: {file} has {len(names)} names, expected 1 to {IGNORED}")
    if config.num_classes not in (None, len(names)):
        raise UserError(f"data.class_names: {file} has {len(names)} names; data.num_classes says {config.num_classes}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.class_names: {file} has the name {name!r} twice")
    return names


class MaskFiles:
    """The images of a part that have a mask, in the order of their paths.

    Args:
        config: the folders, how files are called, and what the values in the masks mean.
        part: training or held-out images.
        num_classes: how many there are.

    Attributes:
        left_out: files in the images' folder that are none.

    Raises:
        UserError: a folder is missing or without images, or images have no mask.
    """

    def __init__(self, config: SegmentationFolderData, part: Part, num_classes: int) -> None:
        self.left_out, self._num_classes = LeftOut(), num_classes
        names = (config.train_images, config.train_masks) if part == "train" else (config.val_images, config.val_masks)
        self._images, self._masks = (config.folder / name for name in names)
        for key, folder in zip(("images", "masks"), (self._images, self._masks), strict=True):
            if not folder.is_dir():
                raise UserError(
                    f"data folder {folder} does not exist; data.{part}_{key} says where it is below data.root"
                )
        self._pairs = self._find(config)
        self._meaning = _meaning(config, num_classes)

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, index: int) -> str:
        """Path of the image."""
        return str(self._images / self._pairs[index][0])

    def mask_name(self, index: int) -> str:
        """Path of the mask."""
        return str(self._masks / self._pairs[index][1])

    def entry(self, index: int) -> str:
        """Path of the image in its folder."""
        return self._pairs[index][0]

    def read(self, index: int) -> Image.Image:
        """Decode the image."""
        return decode(Path(self.name(index)).read_bytes())

    def read_mask(self, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Decode the mask.

        Args:
            index: of the image.
            size: width and height of the image in pixels, which the mask must have.

        Returns:
            uint8 [H, W], the class of each pixel or :data:`~dge_recipes.data.dense_targets.IGNORED`.

        Raises:
            UserError: the mask is of another size or kind, or has a value that no class has.
            OSError, ValueError: it is no whole picture.
        """
        name = self.mask_name(index)
        try:
            picture = decode(Path(name).read_bytes())
        except ValueError as error:
            raise ValueError(f"its mask {name}: {error}") from error
        if picture.mode not in _INDEX_MODES and not picture.mode.startswith("I"):
            raise UserError(f"mask {name}: got a picture of mode {picture.mode}, expected one number per pixel")
        if picture.size != size:
            told = f"{picture.width} x {picture.height} pixels, its image {size[0]} x {size[1]}"
            raise UserError(f"mask {name} has {told}{'; see data.exif' if picture.size == size[::-1] else ''}")
        values = np.asarray(picture).astype(np.int64)
        highest = len(self._meaning) - 1
        classes = self._meaning[np.clip(values, 0, highest)]
        wrong = (classes == _WRONG) | (values < 0) | (values > highest)
        if wrong.any():
            raise UserError(f"mask {name}: got the value {values[wrong][0]}, expected {self._expected()}")
        return classes.astype(np.uint8)

    def _find(self, config: SegmentationFolderData) -> list[tuple[str, str]]:
        """Paths of each image and its mask, in their folders."""
        known, pairs, missing = image_extensions(), [], []
        for path in visible_files(self._images):
            name = os.path.relpath(path, self._images)
            if extension(name) not in known or not name.endswith(config.image_suffix or ""):
                self.left_out.add(path)
                continue
            suffix = os.path.splitext(name)[1] if config.image_suffix is None else config.image_suffix
            mask = name.removesuffix(suffix) + config.mask_suffix
            pairs.append((name, mask))
            if not (self._masks / mask).is_file():
                missing.append(mask)
        if not pairs:
            ending = "" if config.image_suffix is None else f" that end in {config.image_suffix}"
            raise UserError(f"data folder {self._images} holds no images{ending}")
        if missing:
            raise UserError(
                f"{self._masks} lacks {_few(missing)} of {len(pairs)} masks; data.mask_suffix is {config.mask_suffix}"
            )
        return pairs

    def _expected(self) -> str:
        allowed = np.flatnonzero((self._meaning != _WRONG) & (self._meaning != IGNORED))
        ignored = np.flatnonzero(self._meaning == IGNORED)
        told = f"{allowed[0]} to {allowed[-1]}"
        return told + (f", or {' or '.join(map(str, ignored))} to ignore" if len(ignored) else "")


def _meaning(config: SegmentationFolderData, num_classes: int) -> NDArray[np.int64]:
    """The class of each value of a mask."""
    first, ignored = int(config.reduce_zero_label), config.ignore_index
    meaning = np.full(max(num_classes + first, (ignored or 0) + 1), _WRONG)
    meaning[first : first + num_classes] = np.arange(num_classes)
    if config.reduce_zero_label:
        meaning[0] = IGNORED
    if ignored is not None:
        meaning[ignored] = IGNORED
    return meaning


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
