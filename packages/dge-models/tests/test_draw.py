from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from dge_models import draw_granularity, draw_heat_map
from dge_models.draw import enlarge, split_colors, token_share

GREY = torch.full((3, 48, 48), 0.5)


def test_colours_tell_the_splits_apart() -> None:
    assert len(set(split_colors((4, 2, 1)))) == 3
    assert len(set(split_colors((8, 4, 2, 1)))) == 4
    assert split_colors((1,)) == split_colors((4, 2, 1))[:1]
    assert token_share(torch.tensor([0, 1, 2])).tolist() == [1.0, 0.25, 0.0625]


def _lines(picture: Image.Image, y: int) -> list[int]:
    """Where a row of the picture has another colour than the fill beside it."""
    row = [picture.getpixel((x, y)) for x in range(picture.width)]
    fill = max(set(row), key=row.count)
    return [x for x, color in enumerate(row) if color != fill]


@pytest.mark.parametrize(("choice", "inner"), [(0, [8, 16, 24]), (1, [16]), (2, [])])
def test_every_querys_patch_is_outlined(choice: int, inner: list[int]) -> None:
    image = Image.new("RGB", (32, 32), (90, 90, 90))
    picture = draw_granularity(image, torch.tensor([[choice]]), size=32)
    assert picture.size == (32, 32)
    assert _lines(picture, 3) == [0, *inner, 31]


def test_each_region_has_its_splits_colour() -> None:
    picture = draw_granularity(GREY, torch.tensor([[0, 1, 2]] * 3), size=48)
    for index, color in enumerate(split_colors()):
        assert picture.getpixel((16 * index, 8)) == color
        assert picture.getpixel((16 * index, 40)) == color


def test_clipped_regions_end_with_the_grid() -> None:
    picture = draw_granularity(GREY[:, :28, :36], torch.tensor([[2, 2, 0]] * 2), grid=(7, 9), size=28)
    assert picture.size == (36, 28)
    color = split_colors()[0]
    assert [x for x in range(36) if picture.getpixel((x, 2)) == color] == [32, 35]


@pytest.mark.parametrize("image", [GREY, GREY[:1], (GREY * 255).byte(), Image.new("L", (48, 48))])
def test_images_of_every_kind_are_enlarged_by_whole_pixels(image: Any) -> None:
    picture = enlarge(image, 100)
    assert picture.size == (144, 144)
    assert picture.mode == "RGB"


def test_heat_map_grows_with_the_queries() -> None:
    maps = [torch.tensor([[0, 1, 2]] * 3), torch.tensor([[0, 2, 2]] * 3)]
    picture = draw_heat_map(GREY, maps, size=48)
    red = [picture.getpixel((16 * index + 8, 24))[0] for index in range(3)]
    blue = [picture.getpixel((16 * index + 8, 24))[2] for index in range(3)]
    assert red[0] > red[2]
    assert blue[0] < blue[1] < blue[2] or red[1] < red[0]
    assert len({picture.getpixel((16 * index + 8, 24)) for index in range(3)}) == 3


def test_heat_map_of_a_single_split_and_of_a_clipped_grid() -> None:
    assert draw_heat_map(GREY, [torch.zeros(3, 3, dtype=torch.uint8)], (4,), size=48).size == (48, 48)
    maps = [torch.zeros(2, 3, dtype=torch.uint8)]
    assert draw_heat_map(GREY[:, :28, :36], maps, grid=(7, 9), size=28).size == (36, 28)


def test_heat_map_of_layers_with_grids_of_their_own() -> None:
    """A coarse layer counts where it lies: here it is fine in its left half alone."""
    fine, half = torch.full((4, 4), 2), torch.tensor([[0, 2], [0, 2]])
    picture = draw_heat_map(GREY, [fine, half], grids=[(16, 16), (8, 8)], size=48)
    left, right = picture.getpixel((12, 24)), picture.getpixel((36, 24))
    both_coarse = draw_heat_map(GREY, [fine, torch.full((2, 2), 2)], grids=[(16, 16), (8, 8)], size=48)
    assert right == both_coarse.getpixel((36, 24))
    assert left != right
    assert picture.getpixel((22, 2)) == left
    assert picture.getpixel((26, 2)) == right


def test_heat_maps_of_equal_grids_do_not_depend_on_how_they_are_given() -> None:
    maps = [torch.randint(0, 3, (2, 3)) for _ in range(3)]
    one = draw_heat_map(GREY[:, :28, :36], maps, grid=(7, 9), size=56)
    assert one.tobytes() == draw_heat_map(GREY[:, :28, :36], maps, grids=[(7, 9)] * 3, size=56).tobytes()


@pytest.mark.parametrize(("kwargs", "got"), [({"grids": [(12, 12)]}, "1"), ({"grids": [], "grid": (12, 12)}, "a grid")])
def test_grids_must_be_one_per_layer(kwargs: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"grids: got {got}.*; expected one per layer, 2, and no grid"):
        draw_heat_map(GREY, [torch.zeros(3, 3, dtype=torch.int)] * 2, **kwargs)


@pytest.mark.parametrize(
    ("image", "granularity", "kwargs", "reason"),
    [
        (GREY, torch.zeros(1, 3, 3), {}, r"granularity: got torch.float32 \(1, 3, 3\)"),
        (GREY, torch.zeros(3, 3), {}, "granularity: got torch.float32"),
        (GREY, torch.full((3, 3), 3), {}, "granularity: got 3 to 3; expected indices into"),
        (
            GREY,
            torch.zeros(3, 3, dtype=torch.int),
            {"grid": (16, 16)},
            r"got \(3, 3\) regions; expected \(4, 4\)",
        ),
        (GREY, torch.zeros(3, 3, dtype=torch.int), {"splits": (4, 3)}, "splits: got"),
        (GREY * 3, torch.zeros(3, 3, dtype=torch.int), {}, "image: got values from 1.5 to 1.5"),
        (GREY[0], torch.zeros(3, 3, dtype=torch.int), {}, r"image: got shape \(48, 48\)"),
    ],
)
def test_bad_input_is_refused(image: Any, granularity: torch.Tensor, kwargs: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        draw_granularity(image, granularity, **kwargs)


def test_a_heat_map_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="granularities: got none"):
        draw_heat_map(GREY, [])
