"""Outlines as signed distances: negative inside, positive outside, and true to scale near the edge.

All of them lie inside the unit circle. What is drawn from them is smooth: half a pixel on either side of the edge
blends into the ground.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["OUTLINES", "Outline"]

Outline = Callable[[Tensor, Tensor], Tensor]


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
