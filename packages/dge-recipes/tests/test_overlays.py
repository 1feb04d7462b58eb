"""Pictures of detections and masks: what is drawn is where it was found, in the colour of its class."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from dge_recipes.data.dense_targets import IGNORED
from dge_recipes.overlays import class_color, dense_overlay, draw_classes, draw_objects

GREY = torch.full((3, 40, 50), 0.5)


def _pixel(picture: Image.Image, x: int, y: int) -> tuple[int, int, int]:
    red, green, blue = picture.getpixel((x, y))
    return red, green, blue


def test_boxes_are_where_they_were_found() -> None:
    found = {
        "boxes": torch.tensor([[10.0, 8.0, 30.0, 36.0], [1.0, 1.0, 5.0, 5.0]]),
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.9, 0.2]),
    }
    picture = draw_objects(GREY, found, ("Äpfel", "box"), size=200)
    assert picture.size == (200, 160)
    color = class_color(2)
    for x, y in ((40, 100), (119, 100), (80, 143)):
        assert _pixel(picture, x, y) == color
    assert _pixel(picture, 80, 90) == (128, 128, 128)
    assert class_color(1) not in set(picture.get_flattened_data())  # too unlikely
    everything = draw_objects(GREY, found, threshold=0.1, size=200)
    assert _pixel(everything, 12, 19) == class_color(1)


@pytest.mark.parametrize("kind", ["probabilities", "bool"])
def test_masks_tint_their_pixels(kind: str) -> None:
    masks = torch.zeros(1, 40, 50)
    masks[0, 10:20, 20:30] = 0.8
    found = {
        "boxes": torch.tensor([[20.0, 10.0, 30.0, 20.0]]),
        "labels": torch.tensor([3]),
        "masks": masks.unsqueeze(1) if kind == "probabilities" else masks > 0.5,
    }
    picture = draw_objects(GREY, found, size=500)
    expected = tuple((128 + each) / 2 for each in class_color(3))
    assert _pixel(picture, 250, 190) == pytest.approx(expected, abs=2)
    assert _pixel(picture, 400, 300) == (128, 128, 128)


def test_classes_tint_their_pixels_with_a_legend() -> None:
    mask = torch.zeros(80, 100, dtype=torch.int64)
    mask[:40, :50], mask[40:, :50] = 1, IGNORED
    picture = draw_classes(GREY, mask, ("background", "машина"), size=200)
    assert picture.width == 200
    assert picture.height > 160
    expected = tuple((128 + each) / 2 for each in class_color(1))
    assert _pixel(picture, 50, 40) == pytest.approx(expected, abs=2)
    assert _pixel(picture, 50, 120) == _pixel(picture, 150, 40) == (128, 128, 128)
    legend = np.asarray(picture)[160:]
    assert (legend == class_color(1)).all(-1).any()
    numbered = draw_classes(GREY, mask, size=200)  # class 0 is a class like the others then
    assert _pixel(numbered, 150, 40) != (128, 128, 128)


def test_nothing_found() -> None:
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    picture = draw_objects(GREY, {**nothing, "masks": torch.zeros(0, 1, 40, 50)}, size=50)
    assert set(picture.get_flattened_data()) == {(128, 128, 128)}
    assert draw_classes(GREY, torch.full((40, 50), IGNORED), size=50).size == (50, 40)


def test_the_granularity_is_beside_it() -> None:
    routing = Image.new("RGB", (100, 80), (255, 0, 0))
    picture = dense_overlay(GREY, torch.ones(40, 50, dtype=torch.int64), routing, ("a", "b"), caption="50%", size=200)
    assert picture.width == 2 * 200 + 6
    assert _pixel(picture, 300, 80) == (255, 0, 0)
    assert (
        picture.height
        > dense_overlay(GREY, torch.ones(40, 50, dtype=torch.int64), routing, ("a", "b"), size=200).height
    )
    alone = dense_overlay(
        GREY, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}, size=200
    )
    assert alone.size == (200, 160)


def test_neighbouring_classes_have_different_colours() -> None:
    colors = [np.array(class_color(label)) for label in range(90)]
    assert len({tuple(color) for color in colors}) == 90
    assert min(int(np.abs(a - b).max()) for a, b in pairwise(colors)) > 60
