from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from small_models import Build

from dge_models import contact_sheet, draw_trace, trace

TILE = Image.new("RGB", (40, 30), (200, 0, 0))


def test_pictures_stand_where_their_row_and_column_say() -> None:
    other = Image.new("RGB", (40, 30), (0, 0, 200))
    sheet = contact_sheet([[TILE, other], [other, TILE]])
    assert sheet.size == (10 + 2 * 50, 10 + 2 * 40)
    corners = [sheet.getpixel((x, y)) for y in (10, 50) for x in (10, 60)]
    assert corners == [(200, 0, 0), (0, 0, 200), (0, 0, 200), (200, 0, 0)]


@pytest.mark.parametrize(
    "extra", [{"title": "Title"}, {"columns": ["first"]}, {"captions": ["below it"]}, {"splits": (4, 2, 1)}]
)
def test_every_kind_of_text_is_drawn(extra: dict[str, Any]) -> None:
    plain, sheet = contact_sheet([[TILE]]), contact_sheet([[TILE]], **extra)
    assert sheet.height > plain.height
    blank = Image.new("RGB", sheet.size, sheet.getpixel((sheet.width - 1, sheet.height - 1)))
    drawn = ImageChops.difference(sheet, blank).convert("L").point(lambda value: 255 * (value > 0))
    assert drawn.histogram()[255] > TILE.width * TILE.height + 20


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (([],), "rows: got"),
        (([[]],), "rows: got"),
        (([[TILE], [TILE, TILE]],), r"rows: got \[1, 2\]"),
        (([[TILE]], ["a", "b"]), "columns: got 2 headings; expected 1"),
        (([[TILE]], (), ["a", "b"]), "captions: got 2; expected one per row, 1"),
    ],
)
def test_tables_that_do_not_add_up_are_refused(args: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        contact_sheet(*args)


def test_a_trace_is_drawn_with_a_row_per_image_and_a_column_per_layer(small: Build) -> None:
    images = torch.rand(2, 3, 28, 32)
    result = trace(small(img_size=(28, 32)), images)
    sheet = draw_trace(images, result, size=64, title="Granularity")
    assert sheet.width == 10 + 5 * (64 + 10)
    fewer = draw_trace(list(images), result, size=64, layers=[2], captions=["a", "b"])
    assert fewer.width < sheet.width
    assert fewer.height < sheet.height


def test_a_pyramids_trace_is_drawn_with_a_grid_per_layer(small: Build) -> None:
    images = torch.rand(2, 3, 64, 96)
    result = trace(small("pvt_dge_s124_tiny_256"), images)
    sheet = draw_trace(images, result, size=96)
    assert sheet.width == 10 + 7 * (96 + 10)


def test_images_of_another_trace_are_refused(small: Build) -> None:
    result = trace(small(), torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match="images: got 3; expected the 2 of the trace"):
        draw_trace(torch.rand(3, 3, 32, 32), result)
