"""scikit-learn's handwritten digits, drawn smaller than the image on flat ground.

Real data that ships inside a library: 1797 scans of 8 x 8 pixels. The ground around the digit gives a
Dynamic Grained Encoder regions that are worth few queries.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from dge_recipes.classes import Classes
from dge_recipes.data.generated import DigitsData
from dge_recipes.data.image_sets import ImageSet, identify_labels
from dge_recipes.data.sampling import Draw
from dge_recipes.data.section import Part
from dge_recipes.randomness import derive_seed

__all__ = ["TrainingDigits", "UprightDigits", "digit_arrays", "digit_images", "render_digits"]

_CLASSES = Classes(10, tuple("0123456789"))
_HELD_OUT = 360


def digit_images(config: DigitsData, part: Part, seed: int | None) -> ImageSet:
    """The digits of a part: augmented for training by a seed, or upright."""
    images = UprightDigits(config, held_out=part == "val") if seed is None else TrainingDigits(config, seed)
    return ImageSet(images, config.channels, lambda: identify_labels(images.labels.tolist(), _CLASSES))


@lru_cache(maxsize=1)
def digit_arrays() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fixed split: (training scans, labels, held-out scans, labels), stratified by class.

    Returns:
        Scans float32 [1437 or 360, 1, 8, 8] in [0, 1] with ink high; labels int64.
    """
    # Imported late: runs on other data need not wait for it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # The split is part of the data set, so its seed is a constant and not the run's.
    train, held_out = train_test_split(
        range(len(digits.target)), test_size=_HELD_OUT, random_state=0, stratify=digits.target
    )
    scans = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    return scans[train], labels[train], scans[held_out], labels[held_out]


def render_digits(scans: Tensor, image_size: int, digit_size: Tensor, rotation: Tensor, shift: Tensor) -> Tensor:
    """Draw scans on flat ground.

    Args:
        scans: float [B, 1, 8, 8] in [0, 1].
        image_size: side of the square image, in pixels.
        digit_size: float [B], side of the scan inside the image, in pixels.
        rotation: float [B], in radians, counter-clockwise.
        shift: float [B, 2], displacement (x, y) of the scan's centre from the image's, in pixels.

    Returns:
        float [B, 1, image_size, image_size] in [-1, 1]; the ground is -1.
    """
    zoom = image_size / digit_size
    cos, sin = torch.cos(rotation) * zoom, torch.sin(rotation) * zoom
    # affine_grid maps the image's coordinates, in [-1, 1], to the scan's: undo the shift, then turn.
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    offset = -(turn @ (shift * (2 / image_size)).unsqueeze(2))
    grid = F.affine_grid(torch.cat([turn, offset], 2), [len(scans), 1, image_size, image_size], align_corners=False)
    return F.grid_sample(scans, grid, align_corners=False) * 2 - 1


class TrainingDigits(Dataset[tuple[Tensor, int]]):
    """Training digits with a mild random shift, size and rotation, fixed by (seed, epoch, position).

    Args:
        config: sizes and strengths of the augmentation.
        seed: the run's seed.
    """

    def __init__(self, config: DigitsData, seed: int) -> None:
        self.config, self.seed = config, seed
        self.scans, self.labels, _, _ = digit_arrays()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        """Image float32 [1, size, size] in [-1, 1] and its label."""
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[tuple[Tensor, int]]:
        """A batch drawn at once, which PyTorch's loaders ask for: each image is what it would be alone."""
        config, generator = self.config, torch.Generator()
        numbers = torch.empty(len(draws), 4)
        for row, draw in zip(numbers, draws, strict=True):
            generator.manual_seed(derive_seed(self.seed, "augment", draw.epoch, draw.position))
            torch.rand(4, generator=generator, out=row)
        size, turn, *shift = (numbers * 2 - 1).unbind(1)
        chosen = [draw.image for draw in draws]
        images = render_digits(
            self.scans[chosen],
            config.image_size,
            config.digit_size * (1 + size * config.scale),
            turn * math.radians(config.rotation),
            torch.stack(shift, 1) * config.shift,
        )
        return list(zip(images.unbind(0), self.labels[chosen].tolist(), strict=True))


class UprightDigits(Dataset[tuple[Tensor, int]]):
    """Digits upright and centred: always the same images.

    Args:
        config: sizes.
        held_out: the 360 held-out digits, else the training digits without augmentation.
    """

    def __init__(self, config: DigitsData, *, held_out: bool = True) -> None:
        scans, self.labels = digit_arrays()[2:] if held_out else digit_arrays()[:2]
        count, zero = len(scans), torch.zeros(len(scans))
        size = torch.full((count,), config.digit_size)
        self.images = render_digits(scans, config.image_size, size, zero, torch.zeros(count, 2))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image float32 [1, size, size] in [-1, 1] and its label."""
        return self.images[index], int(self.labels[index])
