"""The README's table of what becomes of every kind of picture, row by row: in data sets, and in dge-visualize."""

import io
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms, features

from dge_recipes.config import ImageData, load_config
from dge_recipes.data.decoding import decode
from dge_recipes.data.image_sets import open_source
from dge_recipes.data.images import HeldOutImages, TrainingImages
from dge_recipes.data.pixels import as_seen, to_rgb

_README = Path(__file__).parents[2] / "README.md"
_ORIENTATION = 0x0112
_LYING = ((0, 0, 0), (255, 255, 255), (255, 0, 0))  # from left to right
_RED, _BLUE, _WHITE, _BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)

Pixels = list[tuple[int, int, int]]


def _pixels(picture: Image.Image) -> Pixels:
    assert picture.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3).tolist()]


def _encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _data_sets(content: bytes) -> Pixels:
    return _pixels(to_rgb(decode(content)))


def _visualize(content: bytes) -> Pixels:
    return _pixels(as_seen(decode(content)))


def _close(found: Pixels, expected: Pixels) -> bool:
    return bool(np.abs(np.array(found) - np.array(expected)).max() <= 3)


def _lying(kind: str, exif: object = None, orientation: int = 6, **options: object) -> bytes:
    """Black, white and red blocks beside each other, to be turned by a quarter."""
    blocks = np.repeat(np.repeat(np.array([_LYING], np.uint8), 16, 0), 16, 1)
    if exif is None:
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
    if kind == "TIFF":
        options["tiffinfo"] = {274: orientation}
    else:
        options["exif"] = exif
    return _encode(Image.fromarray(blocks), kind, **options)


_LOSSY = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}


def _corners(picture: Image.Image) -> tuple[tuple[int, int], Pixels]:
    """Size, and the pixels in the middle of the first and the last block."""
    places = ((8, 8), (picture.width - 8, picture.height - 8))
    return picture.size, [picture.getpixel(place) for place in places]  # type: ignore[misc]


def exif_orientation() -> None:
    for kind, options in _LOSSY.items():
        if kind == "AVIF" and not features.check("avif"):
            continue
        for orientation, size, ends in (
            (1, (48, 16), (_BLACK, _RED)),
            (3, (48, 16), (_RED, _BLACK)),
            (6, (16, 48), (_BLACK, _RED)),
            (8, (16, 48), (_RED, _BLACK)),
        ):
            content = _lying(kind, orientation=orientation, **options)
            stored, turned, seen = (
                _corners(each)
                for each in (
                    to_rgb(decode(content)),
                    to_rgb(decode(content), upright=True),
                    as_seen(decode(content)),
                )
            )
            assert stored[0] == (48, 16)
            assert _close(stored[1], [_BLACK, _RED])
            assert turned == seen
            assert seen[0] == size
            assert _close(seen[1], list(ends))


def orientation_of_a_tiff() -> None:
    for compression in ("raw", "tiff_lzw"):
        content = _lying("TIFF", compression=compression)
        for each in (to_rgb(decode(content)), to_rgb(decode(content), upright=True), as_seen(decode(content))):
            assert _corners(each) == ((16, 48), [_BLACK, _RED])


@pytest.mark.filterwarnings("ignore")
def damaged_exif() -> None:
    good = _exif_bytes(6)
    damaged = [good[:number] for number in range(0, len(good), 3)]
    damaged += [good[:20] + bytes([number]) * 3 + good[23:] for number in (0, 9, 255)]
    damaged += [_exif_bytes(number) for number in (0, 9, 77, 60000)]
    turned = 0
    for exif in damaged:
        for kind in ("JPEG", "PNG", "WEBP"):
            content = _lying(kind, exif=exif, **_LOSSY[kind])
            if exif == good[:12] and kind == "JPEG" and PIL.__version__.startswith("10."):
                continue  # which that Pillow does not open
            for each in (to_rgb(decode(content), upright=True), as_seen(decode(content))):
                turned += each.size == (16, 48)
                assert each.size in {(48, 16), (16, 48)}
    assert turned < len(damaged)


def _exif_bytes(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    return exif.tobytes()


def _profile(space: bytes, pcs: bytes, **tags: bytes) -> bytes:
    """An ICC profile of version 2."""
    body, table, start = b"", struct.pack(">I", len(tags)), 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name.encode() + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"none", 0x02400000, b"prtr", space, pcs)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


_WHITE_POINT = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)


def _linear_grey() -> bytes:
    return _profile(b"GRAY", b"XYZ ", wtpt=_WHITE_POINT, kTRC=b"curv" + bytes(8))


def _cyan_ink_is_red() -> bytes:
    ramp, matrix = bytes(range(256)), struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    corners = b"".join(b"\x88\xd0\xc3" if ink & 8 else b"\x00\x80\x80" if ink else b"\xff\x80\x80" for ink in range(16))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + 4 * ramp + corners + 3 * ramp
    return _profile(b"CMYK", b"Lab ", wtpt=_WHITE_POINT, A2B0=table)


def _red_is_blue() -> bytes:
    """sRGB with two primaries exchanged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return srgb.replace(b"rXYZ", b"none").replace(b"bXYZ", b"rXYZ").replace(b"none", b"bXYZ")


def colour_profile() -> None:
    red, grey = Image.new("RGB", (1, 1), _RED), Image.new("L", (1, 1), 128)
    for kind in ("PNG", "TIFF"):
        content = _encode(red, kind, icc_profile=_red_is_blue())
        assert (_data_sets(content), _visualize(content)) == ([_RED], [_BLUE])
        content = _encode(grey, kind, icc_profile=_linear_grey())
        assert (_data_sets(content), _visualize(content)) == ([(128,) * 3], [(188,) * 3])
    content = _encode(Image.new("RGB", (16, 16), _RED), "JPEG", quality=100, icc_profile=_red_is_blue())
    assert _close(_visualize(content)[:1], [_BLUE])
    palette = red.convert("P")
    assert _visualize(_encode(palette, "PNG", icc_profile=_red_is_blue())) == [_BLUE]
    faint = Image.new("RGBA", (1, 1), (*_RED, 0))
    assert _visualize(_encode(faint, "PNG", icc_profile=_red_is_blue())) == [_WHITE]
    for profile in (b"no profile", _red_is_blue()[:300], _cyan_ink_is_red(), _linear_grey()):
        content = _encode(red, "PNG", icc_profile=profile)
        assert (_data_sets(content), _visualize(content)) == ([_RED], [_RED])


def transparency() -> None:
    below = (10, 20, 30)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, *below])
    for content, dropped, seen in (
        (_encode(Image.new("RGBA", (1, 1), (*below, 0)), "PNG"), below, _WHITE),
        (_encode(Image.new("RGBA", (1, 1), (*below, 255)), "PNG"), below, below),
        (_encode(Image.new("RGBA", (1, 1), (0, 0, 0, 102)), "PNG"), _BLACK, (153, 153, 153)),
        (_encode(Image.new("RGBA", (1, 1), (*below, 0)), "WEBP", lossless=True, exact=True), below, _WHITE),
        (_encode(Image.new("RGBA", (1, 1), (*below, 0)), "TIFF"), below, _WHITE),
        (_encode(Image.new("LA", (1, 1), (40, 0)), "PNG"), (40, 40, 40), _WHITE),
        (_encode(palette, "PNG", transparency=b"\x80\x00"), below, _WHITE),
        (_encode(palette, "PNG", transparency=1), below, _WHITE),
        (_encode(palette, "GIF", transparency=1), below, _WHITE),
        (_encode(Image.new("RGB", (1, 1), below), "PNG", transparency=below), below, _WHITE),
        (_encode(Image.new("L", (1, 1), 40), "PNG", transparency=40), (40, 40, 40), _WHITE),
        (_encode(Image.new("1", (1, 1), 0), "PNG", transparency=0), _BLACK, _WHITE),
    ):
        assert (_data_sets(content), _visualize(content)) == ([dropped], [seen])


def several_frames() -> None:
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("MPO", {})):
        first, second = (Image.new("RGB", (16, 16), each) for each in (_RED, _BLUE))
        content = _encode(first, kind, save_all=True, append_images=[second], **options)
        assert decode(content).n_frames == 2  # type: ignore[attr-defined]
        assert _close(_data_sets(content), [_RED] * 256)
        assert _close(_visualize(content), [_RED] * 256)


def _tiff(tags: dict[int, tuple[int, int]], strip: bytes) -> bytes:
    """Little-endian, one strip; tags are (SHORT or LONG, value)."""
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, kind, 1, start if value < 0 else value) for tag, (kind, value) in sorted(tags.items())
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + strip


def grey_of_more_bits() -> None:
    sixteen = Image.fromarray(np.array([[0, 40000, 65535]], np.uint16))
    for kind in ("PNG", "TIFF", "JPEG2000"):
        content = _encode(sixteen, kind)
        assert _data_sets(content) == _visualize(content) == [(0,) * 3, (156,) * 3, (255,) * 3]
    layout = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: -1, 277: 1, 278: 1, 279: 3}
    twelve = _tiff({tag: (4 if tag in (273, 279) else 3, value) for tag, value in layout.items()}, b"\xff\xf8\x00")
    assert _data_sets(twelve) == _visualize(twelve) == [(255,) * 3, (128,) * 3]  # 0xfff and 0x800


def colours_of_16_bits() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = zlib.compress(b"\0" + struct.pack(">3H", 0xFF80, 0x1234, 0))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    assert _data_sets(content) == _visualize(content) == [(0xFF, 0x12, 0)]


def whole_numbers_of_32_bits() -> None:
    content = _encode(Image.fromarray(np.array([[0, 65535]], np.int32)), "TIFF")
    assert _data_sets(content) == _visualize(content) == [_BLACK, _WHITE]
    for value in (-1, 65536):
        content = _encode(Image.new("I", (1, 1), value), "TIFF")
        for convert in (_data_sets, _visualize):
            with pytest.raises(ValueError, match="expected 8 or 16 bits"):
                convert(content)


def floating_point() -> None:
    for convert in (_data_sets, _visualize):
        with pytest.raises(ValueError, match="floating-point"):
            convert(_encode(Image.new("F", (1, 1), 0.5), "TIFF"))


def few_colours() -> None:
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    for content, expected in (
        (_encode(Image.new("1", (1, 1), 1), "PNG"), _WHITE),
        (_encode(Image.new("1", (1, 1), 1), "TIFF", compression="group4"), _WHITE),
        (_encode(palette, "PNG"), (10, 20, 30)),
        (_encode(palette, "GIF"), (10, 20, 30)),
        (_encode(Image.new("L", (1, 1), 77), "PNG"), (77, 77, 77)),
    ):
        assert _data_sets(content) == _visualize(content) == [expected]


def printing_colours() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for kind, options in (("JPEG", {"quality": 100}), ("TIFF", {})):
        content = _encode(cyan, kind, **options)
        assert _close(_data_sets(content)[:1], [(0, 255, 255)])
        assert _data_sets(content) == _visualize(content)
        content = _encode(cyan, kind, icc_profile=_cyan_ink_is_red(), **options)
        assert _close(_data_sets(content)[:1], [(0, 255, 255)])
        red, green, blue = _visualize(content)[0]
        assert red > 100 > max(green, blue)


def other_colour_spaces() -> None:
    red = Image.new("RGB", (16, 16), _RED)
    content = _encode(red.convert("YCbCr"), "TIFF", compression="jpeg", quality=100)
    assert _close(_data_sets(content), [_RED] * 256)
    assert _data_sets(content) == _visualize(content)
    content = _encode(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF")
    assert decode(content).mode == "LAB"
    assert _close(_data_sets(content), [_WHITE])
    assert _data_sets(content) == _visualize(content)


ROWS: dict[str, Callable[[], None]] = {
    "EXIF orientation: JPEG, PNG, WebP, AVIF": exif_orientation,
    "orientation of a TIFF": orientation_of_a_tiff,
    "damaged EXIF, or an orientation that is none": damaged_exif,
    "colour profile (ICC)": colour_profile,
    "transparency": transparency,
    "several frames or pages": several_frames,
    "grey of 12 or 16 bits": grey_of_more_bits,
    "colours of 16 bits": colours_of_16_bits,
    "whole numbers of 32 bits": whole_numbers_of_32_bits,
    "floating-point numbers": floating_point,
    "1 bit, greys, palette": few_colours,
    "CMYK": printing_colours,
    "YCbCr, CIELAB": other_colour_spaces,
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged meta data
def test_row(row: str) -> None:
    ROWS[row]()


def _table() -> Iterator[str]:
    text = _README.read_text(encoding="utf-8")
    table = re.search(r"\n\| a file with \|[^\n]*\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", text)
    assert table is not None
    for line in table[1].splitlines():
        assert line.count("|") == 4
        yield line.split("|")[1].strip()


def test_the_table_is_what_is_tested() -> None:
    assert list(_table()) == list(ROWS)


@pytest.mark.parametrize("kind", ["imagefolder", "tar"])
def test_the_key_turns_a_whole_data_set(kind: str, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "1.jpg").write_bytes(_lying("JPEG"))
        if kind == "tar":
            with tarfile.open(tmp_path / f"{part}.tar", "w") as file:
                file.add(tmp_path / part, part)
    for exif, size in ((None, (48, 16)), (False, (48, 16)), (True, (16, 48))):
        overrides = [f"data.name={kind}", f"data.root={tmp_path}", "data.num_classes=1", "output.dir=out"]
        data = load_config(
            "deit_tiny_256", [*overrides, *([] if exif is None else [f"data.exif={str(exif).lower()}"])]
        ).data
        assert isinstance(data, ImageData)
        for images in (
            TrainingImages(open_source(data, "train"), data, 0, tmp_path),
            HeldOutImages(open_source(data, "val"), data, tmp_path),
        ):
            picture = images.picture(0)
            assert picture is not None
            assert picture.size == size
