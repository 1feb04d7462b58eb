"""Noise with random labels: data that costs nothing to load."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dge_recipes.config.data_sets import RandomData
from dge_recipes.data.sampling import Draw

__all__ = ["RandomImages"]

_POOL = 16


class RandomImages(Dataset[tuple[Tensor, int]]):
    """A few images of noise, again and again.

    Args:
        config: how many, and of which shape.
    """

    def __init__(self, config: RandomData) -> None:
        generator = torch.Generator().manual_seed(0)
        size = config.image_size
        self._images = torch.randn(_POOL, config.channels, size, size, generator=generator)
        self._labels = torch.randint(config.num_classes, (config.num_images,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int | Draw) -> tuple[Tensor, int]:
        """Image float32 [channels, size, size] and its label."""
        number = index.image if isinstance(index, Draw) else index
        return self._images[number % _POOL], self._labels[number]
