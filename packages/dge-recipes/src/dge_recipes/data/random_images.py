"""Noise with random labels: data that costs nothing to load."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dge_recipes.classes import Classes
from dge_recipes.data.generated import RandomData
from dge_recipes.data.image_sets import ImageSet, identify_labels
from dge_recipes.data.sampling import Draw

__all__ = ["RandomImages", "random_images"]

_POOL = 16


def random_images(config: RandomData) -> ImageSet:
    """The same noise for training and for evaluation."""
    images = RandomImages(config)
    return ImageSet(images, config.channels, lambda: identify_labels(images.labels, Classes(config.num_classes)))


class RandomImages(Dataset[tuple[Tensor, int]]):
    """A few images of noise, again and again.

    Args:
        config: how many, and of which shape.
    """

    def __init__(self, config: RandomData) -> None:
        generator = torch.Generator().manual_seed(0)
        size = config.image_size
        self._images = torch.randn(_POOL, config.channels, size, size, generator=generator)
        self.labels: list[int] = torch.randint(config.num_classes, (config.num_images,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Draw) -> tuple[Tensor, int]:
        """Image float32 [channels, size, size] and its label."""
        number = index.image if isinstance(index, Draw) else index
        return self._images[number % _POOL], self.labels[number]
