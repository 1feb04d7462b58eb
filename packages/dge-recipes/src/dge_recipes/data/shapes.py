"""Textured shapes on plain ground, drawn as they are asked for: any number of images, nothing to store.

A class is an outline with a texture. Place, size, rotation and colours are random, so that no two images of a class
have much of their pixels in common; the plain ground is what a Dynamic Grained Encoder can save on.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dge_recipes.config.data_sets import ShapesData
from dge_recipes.data.sampling import Draw
from dge_recipes.data.shape_outlines import OUTLINES
from dge_recipes.data.shape_textures import CELLS, TEXTURES

__all__ = ["NOISE", "ShapeImages", "TrainingShapes", "class_name", "draw_shape"]

NOISE = 0.04  # largest deviation of a pixel, where black is -1 and white 1

_LEVELS = np.array([0.15, 0.5, 0.85])
_JITTER = 0.1
_TRAINING, _HELD_OUT = 0, 1
_OUTLINES, _TEXTURES = tuple(OUTLINES.values()), tuple(TEXTURES.values())


def class_name(label: int) -> str:
    """Outline and texture of a class, such as ``disc, stripes``."""
    outline, texture = _parts(label)
    return f"{list(OUTLINES)[outline]}, {list(TEXTURES)[texture]}"


def _parts(label: int) -> tuple[int, int]:
    """Indices of a class's outline and texture; the first ten classes already have all of both."""
    outline = label % len(OUTLINES)
    return outline, (label // len(OUTLINES) + outline) % len(TEXTURES)


def draw_shape(numbers: np.random.Generator, label: int, image_size: int) -> Tensor:
    """Draw one image.

    Args:
        numbers: decides everything but the class.
        label: the class.
        image_size: side of the square image, in pixels.

    Returns:
        float32 [3, image_size, image_size], black -1 and white 1 (colours keep away from both). The shape is a
        quarter to a half as wide as the image and lies inside it; the ground is one colour, with noise of at most
        :data:`NOISE`.
    """
    outline, texture = _parts(label)
    size, across, down, *turns = numbers.random(5)
    radius = image_size * (1 + size) / 8
    centre = [radius + place * (image_size - 2 * radius) for place in (across, down)]
    ground, *colours = _three_colours(numbers)
    offset = numbers.random(2) * 0.5 - 0.25
    bits = torch.from_numpy(numbers.integers(0, 2, (CELLS, CELLS)).astype(np.float32))
    image = _noise(numbers, image_size).add_(ground)
    # Drawn where the shape can be, which is a quarter of the image at most.
    low = [max(0, math.floor(place - radius - 1)) for place in centre]
    high = [min(image_size, math.ceil(place + radius + 1)) for place in centre]
    x, y = ((torch.arange(a, b) + (0.5 - c)) / radius for a, b, c in zip(low, high, centre, strict=True))
    inside = (0.5 - _OUTLINES[outline](*_turned(x, y, turns[0])) * radius).clamp(0, 1)
    u, v = _turned(x, y, turns[1])
    share = _TEXTURES[texture](u + offset[0], v + offset[1], bits)
    drawn = torch.lerp(colours[0] - ground, colours[1] - ground, share)
    image[:, low[1] : high[1], low[0] : high[0]] += inside * drawn
    return image


def _turned(x: Tensor, y: Tensor, turn: float) -> tuple[Tensor, Tensor]:
    """Coordinates [rows, columns] of a frame turned by a fraction of a whole turn."""
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    y = y.unsqueeze(1)
    return x * cos + y * sin, y * cos - x * sin


def _three_colours(numbers: np.random.Generator) -> Tensor:
    """Colours float32 [3, 3, 1, 1], any two of which differ clearly in every channel."""
    levels = numbers.permuted(np.tile(_LEVELS, (3, 1)), axis=1).T
    levels = levels + numbers.uniform(-_JITTER, _JITTER, levels.shape)
    return torch.from_numpy(levels * 2 - 1).float().view(3, 3, 1, 1)


def _noise(numbers: np.random.Generator, image_size: int) -> Tensor:
    """Noise float32 [3, image_size, image_size], uniform in steps of a 128th of :data:`NOISE`."""
    count = 3 * image_size * image_size
    raw = numbers.bit_generator.random_raw(-(-count // 8)).view(np.uint8)[:count]
    values = torch.from_numpy(raw).view(3, image_size, image_size).float()
    return values.sub_(127.5).mul_(NOISE / 127.5)


def _draw(config: ShapesData, part: int, number: int) -> tuple[Tensor, int]:
    """Image number `number` of a part of the data set, and its label."""
    label = number % config.num_classes
    # A block of Philox's numbers belongs to one (seed, part, number) alone, where hashed seeds would meet by chance.
    source = np.random.Philox(key=[config.seed, part], counter=[0, 0, number, 0])
    return draw_shape(np.random.Generator(source), label, config.image_size), label


class ShapeImages(Dataset[tuple[Tensor, int]]):
    """Always the same images, as evaluation sees them.

    Args:
        config: how many, of how many classes, and their size.
        held_out: the held-out images, else those of the first epoch of training.
    """

    def __init__(self, config: ShapesData, *, held_out: bool = True) -> None:
        self.config, self._part = config, _HELD_OUT if held_out else _TRAINING

    def __len__(self) -> int:
        return self.config.held_out_images if self._part == _HELD_OUT else self.config.num_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image float32 [3, size, size] and its label."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 to {len(self) - 1}")
        return _draw(self.config, self._part, index)


class TrainingShapes(Dataset[tuple[Tensor, int]]):
    """Images to train on: every epoch draws new ones, which (data.seed, epoch, image) fixes.

    Args:
        config: as for :class:`ShapeImages`.
    """

    def __init__(self, config: ShapesData) -> None:
        self.config = config

    def __len__(self) -> int:
        return self.config.num_images

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        """Image float32 [3, size, size] and its label."""
        return _draw(self.config, _TRAINING, draw.epoch * len(self) + draw.image)

    def __getitems__(self, draws: Sequence[Draw]) -> list[tuple[Tensor, int]]:
        """A batch, image by image: one image's numbers fit a processor's cache, a batch's do not."""
        return [self[draw] for draw in draws]
