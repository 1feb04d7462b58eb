"""A folder of pictures as tensors: those to calibrate on, and those held out to measure on."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dge_recipes.config import PicturesData
from dge_recipes.config.config_errors import describe
from dge_recipes.config.loading import parse_yaml
from dge_recipes.data.image_sets import open_source
from dge_recipes.data.images import UNREADABLE, HeldOutImages
from dge_recipes.data.section import ImageSource, Part
from dge_recipes.data.workers import worker_context, worker_signals
from dge_recipes.errors import UserError

__all__ = ["Pictures", "pictures_section", "read_pictures", "spread"]

_OWN = ("name", "root", "image_size")  # what the command line has other words for


@dataclass(frozen=True)
class Pictures:
    """What a folder holds.

    Attributes:
        section: how the pictures are read.
        train: all that are not held out, for who trains on them.
        calibration: of those, batches of float32 [B, 3, size, size], normalised.
        held_out: the same of pictures that are held out.
        facts: numbers for the report.
    """

    section: PicturesData
    train: ImageSource
    calibration: list[Tensor]
    held_out: list[Tensor]
    facts: dict[str, Any]


def pictures_section(folder: Path, view: Mapping[str, Any], overrides: Sequence[str]) -> PicturesData:
    """The data section of a folder of pictures.

    Args:
        folder: of the pictures.
        view: how the model wants them.
        overrides: ``data.key=value`` each, such as ``data.unreadable=skip`` and ``data.exif=true``.

    Raises:
        UserError: an override that is none, or of another section.
    """
    keys: dict[str, Any] = {"workers": 0, **view}
    for override in overrides:
        key, equals, text = override.partition("=")
        section, _, name = key.partition(".")
        if not equals or section != "data" or not name or name in _OWN:
            raise UserError(
                f"got {override!r}; expected data.key=value, such as data.unreadable=skip or data.exif=true "
                "(the folder is --images, the size --image-size)"
            )
        keys[name] = parse_yaml(text, f"the value in {override!r}")
    try:
        return PicturesData.model_validate({**keys, "name": "pictures", "root": str(folder)})
    except ValidationError as error:
        raise UserError(f"data: {describe(error)}") from error


def read_pictures(section: PicturesData, batch_size: int, limit: int) -> Pictures:
    """Read the pictures that methods are calibrated on, and those that they are measured on.

    Args:
        section: where they are, and how they are read.
        batch_size: pictures in a batch.
        limit: of each kind at most so many, evenly spaced in the order of their paths.

    Raises:
        UserError: there are fewer than two, or one cannot be read and ``data.unreadable`` is ``error``.
    """
    train, held_out = open_source(section, "train"), section.open("val")
    scratch = Path(tempfile.mkdtemp(prefix="dge-compress-"))
    batches: dict[Part, list[Tensor]] = {}
    unreadable: list[str] = []
    try:
        parts: tuple[tuple[Part, ImageSource], ...] = (("train", train), ("val", held_out))
        for part, source in parts:
            images = HeldOutImages(source, section, scratch)
            batches[part] = _read(images, section.workers, batch_size, limit)
            if images.skipped is not None and images.skipped.path.exists():
                unreadable = images.skipped.path.read_text(encoding="utf-8").splitlines()
            if not batches[part]:
                what = "calibrate on" if part == "train" else "hold out"
                raise UserError(f"--images {section.root}: none of the {len(source)} pictures to {what} can be read")
    finally:
        if not any(scratch.iterdir()) or len(batches) == len(parts):  # else it lists what ended the run
            shutil.rmtree(scratch)
    facts = {
        "folder": section.root,
        "found": len(train) + len(held_out),
        "calibration": sum(map(len, batches["train"])),
        "held_out": sum(map(len, batches["val"])),
        "unreadable": unreadable,
        "left_out": train.left_out.as_dict(),
    }
    return Pictures(section, train, batches["train"], batches["val"], facts)


def spread(count: int, most: int) -> list[int]:
    """Indices of at most so many of some pictures, evenly spaced: neighbours in a folder resemble each other.

    Args:
        count: of the pictures.
        most: of the indices.
    """
    chosen = min(count, most)
    return [index * count // chosen for index in range(chosen)]


def _read(images: HeldOutImages, workers: int, batch_size: int, limit: int) -> list[Tensor]:
    chosen = Subset(images, spread(len(images), limit))
    loader = DataLoader(
        chosen,
        batch_size,
        num_workers=workers,
        multiprocessing_context=worker_context() if workers > 0 else None,
        worker_init_fn=worker_signals(),
    )
    batches = [pixels[labels != UNREADABLE] for pixels, labels in loader]
    images.check_skipped()
    return [batch for batch in batches if len(batch)]
