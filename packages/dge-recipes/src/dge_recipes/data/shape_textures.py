"""Textures that fill an outline: the share of the second colour at each point.

A pattern repeats four times across the outline, so that it can still be told in an outline of 16 pixels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CELLS", "TEXTURES", "Texture"]

# Coordinates x and y, 1 at the outline's radius, and CELLS x CELLS random bits; to shares in [0, 1].
Texture = Callable[[Tensor, Tensor, Tensor], Tensor]

CELLS = 12
_CELL = 0.25
_WAVE = 2 * math.pi / 0.5


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
