"""Scenes: a few of the drawn shapes on a ground that is mostly empty, with the box and the mask of each.

A class is an outline. Texture, colours, place, size and rotation are random, and shapes hide parts of each other. The
ground has soft blotches and noise, and nothing to find: it is what a Dynamic Grained Encoder can save on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from dge_recipes.classes import Classes
from dge_recipes.data.dense_targets import detection_target, segmentation_target
from dge_recipes.data.generated import ScenesData
from dge_recipes.data.identity import identify_images
from dge_recipes.data.image_sets import ImageSet
from dge_recipes.data.sampling import Draw
from dge_recipes.data.section import Part
from dge_recipes.data.shapes import CELLS, OUTLINES, TEXTURES, noise, numbers_of, turned

__all__ = ["BACKGROUND", "KINDS", "VISIBLE", "Scene", "TrainingScenes", "UnchangingScenes"]
__all__ += ["detection_scenes", "draw_scene", "segmentation_scenes"]

# The classes, those that differ most first.
KINDS = ("disc", "square", "triangle", "cross", "star", "ring", "crescent", "bar", "half disc", "corner")
BACKGROUND = "background"
VISIBLE = 0.3  # a shape of which a smaller share would be seen is not drawn

_LEVELS = np.array([-0.65, 0.0, 0.65])
_JITTER = 0.15
_BLOTCHES, _BLOTCH = 5, 0.12  # per side, and how much lighter or darker they are
_NOISE = 0.06
_TRAINING, _HELD_OUT = 0, 1

_OUTLINES, _TEXTURES = tuple(OUTLINES[kind] for kind in KINDS), tuple(TEXTURES.values())


@dataclass(frozen=True)
class Scene:
    """A drawn image and what is in it, from front to back.

    Attributes:
        image: float32 [3, size, size], black -1 and white 1; values lie well between.
        labels: place of each shape's kind in :data:`KINDS`.
        masks: bool [shapes, size, size], what is seen of each shape. No pixel is in two masks.
        boxes: float32 [shapes, 4], left, top, right and bottom edge in pixels of what is seen of each shape.
    """

    image: Tensor
    labels: list[int]
    masks: Tensor
    boxes: Tensor


def draw_scene(numbers: np.random.Generator, config: ScenesData) -> Scene:
    """Draw one scene.

    Args:
        numbers: decides everything.
        config: sizes, and the number of classes and shapes.
    """
    size, count = config.image_size, int(numbers.integers(1, config.max_objects + 1))
    ground, colours = _colours(numbers, count)
    image = _ground(numbers, ground, size)
    kinds = numbers.integers(0, config.num_classes, count).tolist()
    textures = numbers.integers(0, len(_TEXTURES), count).tolist()
    bits = torch.from_numpy(numbers.integers(0, 2, (count, CELLS, CELLS)).astype(np.float32))
    labels: list[int] = []
    boxes: list[list[float]] = []
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    clear, taken = torch.ones(size, size), torch.zeros(size, size, dtype=torch.bool)
    drawn = torch.zeros(3, size, size)
    for number, places in enumerate(numbers.random((count, 7)).tolist()):
        radius = size / 2 * config.smallest * (config.largest / config.smallest) ** places[0]
        centre = [radius + place * (size - 2 * radius) for place in places[1:3]]
        left, top = (max(0, math.floor(place - radius - 1)) for place in centre)
        right, bottom = (min(size, math.ceil(place + radius + 1)) for place in centre)
        x, y = (torch.arange(a, b) + (0.5 - c) for a, b, c in zip((left, top), (right, bottom), centre, strict=True))
        x, y = x / radius, y / radius
        share = (0.5 - _OUTLINES[kinds[number]](*turned(x, y, places[3])) * radius).clamp_(0, 1)
        window = (slice(top, bottom), slice(left, right))
        own = share >= 0.5
        seen = own & ~taken[window]
        if int(seen.sum()) < max(1.0, VISIBLE * int(own.sum())):
            continue
        masks[len(labels)][window] = seen
        boxes.append(_box(seen, left, top))
        labels.append(kinds[number])
        u, v = turned(x, y, places[4])
        texture = _TEXTURES[textures[number]](u + (places[5] / 2 - 0.25), v + (places[6] / 2 - 0.25), bits[number])
        # From front to back: each shape gets what those before it left of a pixel, and the ground the rest.
        share *= clear[window]
        drawn[:, top:bottom, left:right] += share * torch.lerp(colours[number, 0], colours[number, 1], texture)
        clear[window] -= share
        taken[window] |= own
    return Scene(image.mul_(clear).add_(drawn), labels, masks[: len(labels)], torch.tensor(boxes))


def _box(seen: Tensor, left: int, top: int) -> list[float]:
    """The edges of the pixels of a mask in a window that begins at (left, top)."""
    columns, rows = (np.flatnonzero(seen.any(axis).numpy()) for axis in (0, 1))
    return [float(edge) for edge in (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)]


def _colours(numbers: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """The ground's colour float32 [3, 1, 1], and two of each shape [count, 2, 3, 1, 1].

    A shape's colours differ from each other, and both from the ground's, clearly in every channel.
    """
    levels = numbers.permuted(np.tile(_LEVELS, (3, 1)), axis=1).T
    swap = numbers.integers(0, 2, (count, 1, 3)) == 1
    pairs = np.where(swap, levels[None, [2, 1]], levels[None, [1, 2]])
    every = np.concatenate([levels[:1], pairs.reshape(-1, 3)])
    colours = torch.from_numpy(every + numbers.uniform(-_JITTER, _JITTER, every.shape)).float()
    return colours[0].view(3, 1, 1), colours[1:].view(count, 2, 3, 1, 1)


def _ground(numbers: np.random.Generator, colour: Tensor, size: int) -> Tensor:
    """Ground float32 [3, size, size]: a colour with soft blotches and noise."""
    blotches = torch.from_numpy(numbers.uniform(-_BLOTCH, _BLOTCH, (1, 1, _BLOTCHES, _BLOTCHES))).float()
    soft = F.interpolate(blotches, (size, size), mode="bilinear", align_corners=True)[0]
    return noise(numbers, size, _NOISE).add_(soft).add_(colour)


# From a scene, the number of its image and whether it is for evaluation to (image, target).
Form = Callable[[Scene, int, bool], tuple[Tensor, Any]]


def detection_scenes(config: ScenesData, part: Part, seed: int | None, *, masks: bool) -> ImageSet:
    """The scenes of a part with boxes. The names of the classes do not count the background.

    Args:
        config: how many scenes, and what is in them.
        part: training or held-out scenes.
        seed: None for the same scenes in every epoch, in the form that evaluation wants.
        masks: targets hold the shapes' masks too.
    """

    def form(scene: Scene, number: int, evaluation: bool) -> tuple[Tensor, Any]:
        labels = torch.tensor(scene.labels) + 1
        shown = scene.masks.to(torch.uint8) if masks else None
        areas = scene.masks.flatten(1).sum(1).float() if evaluation else None
        return scene.image, detection_target(scene.boxes, labels, shown, number, areas)

    return _image_set(config, part, seed, form, KINDS[: config.num_classes])


def segmentation_scenes(config: ScenesData, part: Part, seed: int | None) -> ImageSet:
    """The scenes of a part with index masks: 0 is the background, which is a class.

    Args:
        config: how many scenes, and what is in them.
        part: training or held-out scenes.
        seed: None for the same scenes in every epoch, in the form that evaluation wants.
    """

    def form(scene: Scene, number: int, evaluation: bool) -> tuple[Tensor, Any]:
        numbers = (torch.tensor(scene.labels) + 1).view(-1, 1, 1)
        mask = (scene.masks * numbers).sum(0)
        return scene.image, segmentation_target(mask, number) if evaluation else mask

    return _image_set(config, part, seed, form, (BACKGROUND, *KINDS[: config.num_classes]))


def _image_set(config: ScenesData, part: Part, seed: int | None, form: Form, names: tuple[str, ...]) -> ImageSet:
    images = UnchangingScenes(config, form, held_out=part == "val") if seed is None else TrainingScenes(config, form)
    classes, count = Classes(len(names), names), len(images)
    return ImageSet(images, 3, lambda: identify_images(((str(number), ()) for number in range(count)), classes))


def _scene(config: ScenesData, part: int, number: int) -> Scene:
    return draw_scene(numbers_of(config.seed, part, number), config)


class UnchangingScenes(Dataset[tuple[Tensor, Any]]):
    """Always the same scenes, as evaluation sees them.

    Args:
        config: how many, and what is in them.
        form: makes an image and its target of a scene.
        held_out: the held-out scenes, else those of the first epoch of training.
    """

    def __init__(self, config: ScenesData, form: Form, *, held_out: bool = True) -> None:
        self.config, self._form, self._part = config, form, _HELD_OUT if held_out else _TRAINING

    def __len__(self) -> int:
        return self.config.held_out_images if self._part == _HELD_OUT else self.config.num_images

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Image float32 [3, size, size] and its target."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 to {len(self) - 1}")
        return self._form(_scene(self.config, self._part, index), index, True)


class TrainingScenes(Dataset[tuple[Tensor, Any]]):
    """Scenes to train on: every epoch draws new ones, which (data.seed, epoch, image) fixes.

    Args:
        config, form: as for :class:`UnchangingScenes`.
    """

    def __init__(self, config: ScenesData, form: Form) -> None:
        self.config, self._form = config, form

    def __len__(self) -> int:
        return self.config.num_images

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Any]:
        """Image float32 [3, size, size] and its target."""
        return self._form(_scene(self.config, _TRAINING, draw.epoch * len(self) + draw.image), draw.image, False)
