"""Every kind of picture becomes RGB, and none becomes white without a word."""

import io

import numpy as np
import pytest
from PIL import Image

from dge_recipes.data.pixels import to_rgb


def _decoded(picture: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return Image.open(buffer)


@pytest.mark.parametrize("dtype", [np.uint16, ">u2", np.int32])
def test_grey_of_16_bits_is_scaled(dtype: object) -> None:
    grey = np.array([[0, 40000, 65535]], dtype=dtype)  # type: ignore[call-overload]
    picture = Image.fromarray(grey)
    assert picture.mode != "L"
    for opened in (picture, _decoded(picture, "TIFF")):
        rgb = to_rgb(opened)
        assert [rgb.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (156,) * 3, (255,) * 3]


def test_what_has_no_known_white_is_an_error() -> None:
    with pytest.raises(ValueError, match="floating-point numbers; expected 8 or 16 bits"):
        to_rgb(Image.new("F", (2, 2), 0.5))
    for value in (-1, 65536):
        with pytest.raises(ValueError, match=f"go from {value} to {value}; expected 8 or 16 bits"):
            to_rgb(Image.new("I", (2, 2), value))


def test_other_modes() -> None:
    assert to_rgb(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), (9, 8, 7, 100))).getpixel((0, 0)) == (9, 8, 7)
    assert to_rgb(_decoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4)) == (255, 0, 0)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert to_rgb(_decoded(palette)).getpixel((0, 0)) == (10, 20, 30)
    assert to_rgb(_decoded(palette, transparency=b"\x00\x80")).getpixel((0, 0)) == (10, 20, 30)
