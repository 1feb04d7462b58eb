"""Training images as evaluation sees them, for setting a budget without looking at held-out ones."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dge_recipes.config import Config, DigitsData, RandomData, ShapesData
from dge_recipes.data.digits import UprightDigits
from dge_recipes.data.images import UNREADABLE, HeldOutImages
from dge_recipes.data.random_images import RandomImages
from dge_recipes.data.shapes import ShapeImages
from dge_recipes.data.sources import open_source

__all__ = ["calibration_batches"]

_IMAGES = 512


def calibration_batches(config: Config) -> list[Tensor]:
    """Evenly spaced training images, resized and cropped but not augmented.

    Args:
        config: the data set, and ``eval.batch_size``.

    Returns:
        Batches [<= eval.batch_size, C, H, W], 512 images in all or as many as there are.

    Raises:
        UserError: the data are not there.
    """
    data: Any
    if isinstance(config.data, DigitsData):
        data = UprightDigits(config.data, held_out=False)
    elif isinstance(config.data, RandomData):
        data = RandomImages(config.data)
    elif isinstance(config.data, ShapesData):
        data = ShapeImages(config.data, held_out=False)
    else:
        data = HeldOutImages(open_source(config.data, "train"), config.data, Path(config.output.dir))
    count = min(_IMAGES, len(data))
    samples = [data[index * len(data) // count] for index in range(count)]
    images: Tensor = default_collate([image for image, label in samples if label != UNREADABLE])
    return list(torch.split(images, config.eval.batch_size))
