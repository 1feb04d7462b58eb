"""Random crops of pictures that are kept in memory, small: decoding photographs would take longer than a step."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from dge_recipes.compress.pictures import spread
from dge_recipes.data.images import HeldOutImages
from dge_recipes.data.section import ImageData, ImageSource
from dge_recipes.data.transforms import Transform
from dge_recipes.errors import UserError
from dge_recipes.randomness import derive_seed, isolated_seed

__all__ = ["FITTED_ON", "Crops", "kept_side", "read_crops", "with_crops"]

FITTED_ON = 64
"""Images that routers are fitted on at least: fewer pictures are made up for by crops of them."""

_MOST = 512  # pictures
_LARGER = (1.5, 5.0)  # than the crops, by the short side: at least, and at most
_PIXELS = 128e6  # of all pictures together, as long as they are larger than they have to be
_VARIED_SCALE = (0.04, 1.0)


class Crops:
    """Random crops, flipped half of the time, in batches that a seed and their number fix.

    Args:
        pictures: RGB.
        section: size, scale, normalisation and filter of the crops, and how often they are flipped.
        seed: of the crops.
    """

    def __init__(self, pictures: list[Image.Image], section: ImageData, seed: int) -> None:
        self._pictures, self._section, self._seed = pictures, section, seed
        self._transform = _transform(section, section.crop_scale)

    def varied(self) -> "Crops":
        """Crops of the same pictures that show more: 4 % to all of a picture, in other colours, some of them blurred.

        A scale that the section names is kept. Where few pictures are learned from, these stand for more of them.
        """
        chosen = "crop_scale" in self._section.model_fields_set
        crops = Crops(self._pictures, self._section, self._seed)
        scale = self._section.crop_scale if chosen else _VARIED_SCALE
        colours = {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.8}
        crops._transform = _transform(self._section, scale, **colours, grayscale_prob=0.1, gaussian_blur_prob=0.2)
        return crops

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._pictures)

    def batch(self, number: int, size: int) -> Tensor:
        """Crops float32 [size, 3, H, W], normalised; every picture comes once before any comes again."""
        images = []
        for place in range(number * size, (number + 1) * size):
            epoch, position = divmod(place, len(self._pictures))
            order = torch.randperm(
                len(self._pictures), generator=torch.Generator().manual_seed(derive_seed(self._seed, "order", epoch))
            )
            with isolated_seed(derive_seed(self._seed, "crop", place)):
                images.append(self._transform(self._pictures[int(order[position])]))
        return torch.stack(images)


def with_crops(batches: Sequence[Tensor], crops: Crops, count: int) -> list[Tensor]:
    """Batches, and crops after them that make up for what they lack of a number of images.

    Args:
        batches: [B, 3, H, W] each, the first one as large as any; at least one.
        crops: of any pictures.
        count: of images that there should be.
    """
    filled, images, size = list(batches), sum(map(len, batches)), len(batches[0])
    number = 0
    while images < count:
        batch = crops.batch(number, size)[: count - images].to(batches[0])
        filled.append(batch)
        images, number = images + len(batch), number + 1
    return filled


def read_crops(source: ImageSource, section: ImageData, seed: int) -> Crops:
    """Read pictures, at most 512 of them, evenly spaced, and keep them as large as :func:`kept_side` says.

    Args:
        source: of the pictures; none of them held out.
        section: how they are read, and how large the crops are.
        seed: of the crops.

    Raises:
        UserError: one cannot be read and ``data.unreadable`` is ``error``, or none can.
    """
    pictures = []
    with tempfile.TemporaryDirectory(prefix="dge-compress-") as scratch:  # unreadable ones are listed already
        images = HeldOutImages(source, section, Path(scratch))
        chosen = spread(len(images), _MOST)
        side = kept_side(len(chosen), section.image_size)
        for index in chosen:
            picture = images.picture(index)
            if picture is not None:
                pictures.append(_smaller(picture, side))
    if not pictures:
        raise UserError(f"none of the {len(chosen)} pictures to learn from can be read")
    return Crops(pictures, section, seed)


def kept_side(count: int, size: int) -> int:
    """The short side that pictures are reduced to in memory, in pixels.

    Args:
        count: of the pictures. Few are kept up to five times as large as the crops, so that small crops of them are
            sharp; many half as large again.
        size: of the crops.
    """
    least, most = (factor * size for factor in _LARGER)
    return round(min(max(math.sqrt(_PIXELS / (1.5 * max(count, 1))), least), most))


def _transform(section: ImageData, scale: tuple[float, float], **more: Any) -> Transform:
    steps = create_transform(
        section.image_size,
        is_training=True,
        scale=scale,
        hflip=section.hflip,
        auto_augment=None,
        interpolation=section.interpolation,
        re_prob=0.0,
        mean=section.mean,
        std=section.std,
        **{"color_jitter": 0.0, **more},
    )
    return Transform(steps)


def _smaller(picture: Image.Image, side: int) -> Image.Image:
    """With a short side of `side` pixels, if it has more."""
    factor = side / min(picture.size)
    if factor >= 1:
        return picture
    width, height = (max(1, round(each * factor)) for each in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
