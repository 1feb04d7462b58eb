"""Textured shapes on plain ground, drawn as they are asked for: any number of images, nothing to store.

A class is an outline with a texture. Place, size, rotation and colours are random, so that no two images of a class
have much of their pixels in common; the plain ground is what a Dynamic Grained Encoder can save on.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dge_recipes.classes import Classes
from dge_recipes.data.generated import ShapesData
from dge_recipes.data.image_sets import ImageSet, identify_labels
from dge_recipes.data.sampling import Draw
from dge_recipes.data.section import Part

__all__ = ["CELLS", "NOISE", "OUTLINES", "TEXTURES"]
__all__ += ["ShapeImages", "TrainingShapes", "class_name", "draw_shape", "shape_images"]
__all__ += ["noise", "numbers_of", "turned"]

# An outline is a signed distance: negative inside, positive outside, and true to scale near the edge. All lie inside
# the unit circle. What is drawn from them is smooth: half a pixel on either side of the edge blends into the ground.
Outline = Callable[[Tensor, Tensor], Tensor]
# A texture is the share of the second colour at each point, in [0, 1]. It is given coordinates x and y, 1 at the
# outline's radius, and CELLS x CELLS random bits. It repeats four times across, so that it can still be told in an
# outline of 16 pixels.
Texture = Callable[[Tensor, Tensor, Tensor], Tensor]

CELLS = 12
_CELL = 0.25
_WAVE = 2 * math.pi / 0.5

NOISE = 0.04  # largest deviation of a pixel, where black is -1 and white 1

_LEVELS = np.array([0.15, 0.5, 0.85])
_JITTER = 0.1
_TRAINING, _HELD_OUT = 0, 1


def shape_images(config: ShapesData, part: Part, seed: int | None) -> ImageSet:
    """The images of a part: new ones in every epoch of training, or always the same ones."""
    images = ShapeImages(config, held_out=part == "val") if seed is None else TrainingShapes(config)
    count = config.num_classes
    classes = Classes(count, tuple(class_name(label) for label in range(count)))
    return ImageSet(
        images, config.channels, lambda: identify_labels((number % count for number in range(len(images))), classes)
    )


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
    image = noise(numbers, image_size).add_(ground)
    # Drawn where the shape can be, which is a quarter of the image at most.
    low = [max(0, math.floor(place - radius - 1)) for place in centre]
    high = [min(image_size, math.ceil(place + radius + 1)) for place in centre]
    x, y = ((torch.arange(a, b) + (0.5 - c)) / radius for a, b, c in zip(low, high, centre, strict=True))
    inside = (0.5 - _OUTLINES[outline](*turned(x, y, turns[0])) * radius).clamp(0, 1)
    u, v = turned(x, y, turns[1])
    share = _TEXTURES[texture](u + offset[0], v + offset[1], bits)
    drawn = torch.lerp(colours[0] - ground, colours[1] - ground, share)
    image[:, low[1] : high[1], low[0] : high[0]] += inside * drawn
    return image


def turned(x: Tensor, y: Tensor, turn: float) -> tuple[Tensor, Tensor]:
    """Coordinates [rows, columns] of a frame turned by a fraction of a whole turn."""
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    y = y.unsqueeze(1)
    return x * cos + y * sin, y * cos - x * sin


def _three_colours(numbers: np.random.Generator) -> Tensor:
    """Colours float32 [3, 3, 1, 1], any two of which differ clearly in every channel."""
    levels = numbers.permuted(np.tile(_LEVELS, (3, 1)), axis=1).T
    levels = levels + numbers.uniform(-_JITTER, _JITTER, levels.shape)
    return torch.from_numpy(levels * 2 - 1).float().view(3, 3, 1, 1)


def noise(numbers: np.random.Generator, image_size: int, largest: float = NOISE) -> Tensor:
    """Noise float32 [3, image_size, image_size], uniform up to `largest` in steps of its 128th."""
    count = 3 * image_size * image_size
    raw = numbers.bit_generator.random_raw(-(-count // 8)).view(np.uint8)[:count]
    values = torch.from_numpy(raw).view(3, image_size, image_size).float()
    return values.sub_(127.5).mul_(largest / 127.5)


def _draw(config: ShapesData, part: int, number: int) -> tuple[Tensor, int]:
    """Image number `number` of a part of the data set, and its label."""
    label = number % config.num_classes
    return draw_shape(numbers_of(config.seed, part, number), label, config.image_size), label


def numbers_of(seed: int, part: int, number: int) -> np.random.Generator:
    """The random numbers that image `number` of a part is drawn from: nobody else's."""
    # A block of Philox's numbers belongs to one (seed, part, number) alone, where hashed seeds would meet by chance.
    return np.random.Generator(np.random.Philox(key=[seed, part], counter=[0, 0, number, 0]))


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


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.72).abs() - 0.28


def _half_disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 1, x)


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 1, 0.75 - torch.hypot(x - 0.5, y))


def _box(left: float, right: float, bottom: float, top: float) -> Outline:
    width, height = (right - left) / 2, (top - bottom) / 2

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return torch.maximum((x - left - width).abs() - width, (y - bottom - height).abs() - height)

    return distance


def _union(first: Outline, second: Outline) -> Outline:
    return lambda x, y: torch.minimum(first(x, y), second(x, y))


def _star(points: int, notch: float) -> Outline:
    """Points at radius 1 and notches at radius `notch` between them; a polygon where the edges are straight."""
    sector = math.pi / points
    edge = complex(notch * math.cos(sector) - 1, notch * math.sin(sector))
    normal = -1j * edge / abs(edge)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        turns = torch.atan2(y, x) / (2 * sector)
        angle = (turns - turns.round()).abs() * (2 * sector)  # folded: one half of one point stands for all
        radius = torch.hypot(x, y)
        return (radius * angle.cos() - 1) * normal.real + radius * angle.sin() * normal.imag

    return distance


OUTLINES: dict[str, Outline] = {
    "disc": _disc,
    "ring": _ring,
    "half disc": _half_disc,
    "crescent": _crescent,
    "triangle": _star(3, 0.5),
    "square": _box(-0.7, 0.7, -0.7, 0.7),
    "bar": _box(-0.94, 0.94, -0.3, 0.3),
    "cross": _union(_box(-0.95, 0.95, -0.3, 0.3), _box(-0.3, 0.3, -0.95, 0.95)),
    "star": _star(5, 0.4),
    "corner": _union(_box(-0.7, -0.15, -0.7, 0.7), _box(-0.7, 0.7, -0.7, -0.15)),
}


def _soft(value: Tensor) -> Tensor:
    """0 below zero and 1 above, with a transition that does not flicker when it falls between pixels."""
    return (0.5 + 2 * value).clamp(0, 1)


def _plain(x: Tensor, y: Tensor, bits: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _gradient(x: Tensor, y: Tensor, bits: Tensor) -> Tensor:
    return (0.5 + 0.6 * x).clamp(0, 1)


def _stripes(x: Tensor, y: Tensor, bits: Tensor) -> Tensor:
    return _soft((_WAVE * x).sin())


def _checks(x: Tensor, y: Tensor, bits: Tensor) -> Tensor:
    return _soft((_WAVE * x).sin() * (_WAVE * y).sin())


def _dots(x: Tensor, y: Tensor, bits: Tensor) -> Tensor:
    return _soft((_WAVE * x).cos() + (_WAVE * y).cos() - 0.7)


def _grid(x: Tensor, y: Tensor, bits: Tensor) -> Tensor:
    return _soft(torch.maximum((_WAVE * x).cos(), (_WAVE * y).cos()) - 0.75)


def _circles(x: Tensor, y: Tensor, bits: Tensor) -> Tensor:
    return _soft((_WAVE * torch.hypot(x, y)).cos())


def _spokes(x: Tensor, y: Tensor, bits: Tensor) -> Tensor:
    return _soft((8 * torch.atan2(y, x)).cos())


def _waves(x: Tensor, y: Tensor, bits: Tensor) -> Tensor:
    return _soft((_WAVE * x + 2 * (0.75 * _WAVE * y).sin()).sin())


def _patches(x: Tensor, y: Tensor, bits: Tensor) -> Tensor:
    column, row = ((each / _CELL + CELLS / 2).long().clamp(0, CELLS - 1) for each in (x, y))
    return bits.flatten()[row * CELLS + column]


TEXTURES: dict[str, Texture] = {
    "plain": _plain,
    "gradient": _gradient,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "grid": _grid,
    "circles": _circles,
    "spokes": _spokes,
    "waves": _waves,
    "patches": _patches,
}

_OUTLINES, _TEXTURES = tuple(OUTLINES.values()), tuple(TEXTURES.values())
