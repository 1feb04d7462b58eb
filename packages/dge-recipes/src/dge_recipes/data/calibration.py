"""Training images as evaluation sees them, for setting a budget without looking at held-out ones."""

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dge_recipes.config import Config
from dge_recipes.data.image_sets import plain_images
from dge_recipes.data.images import UNREADABLE

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
    data = plain_images(config, "train").images
    count = min(_IMAGES, len(data))
    samples = [data[index * len(data) // count] for index in range(count)]
    images: Tensor = default_collate([image for image, label in samples if label != UNREADABLE])
    return list(torch.split(images, config.eval.batch_size))
