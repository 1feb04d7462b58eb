"""Bytes that are no whole picture are the picture's fault, whatever the decoder raises; the rest is the machine's."""

import errno
import io
import mmap
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from dge_recipes.data.decoding import PictureError, decode, is_machine_error

# What Pillow warns of in damaged pictures is not what is looked at here.
pytestmark = pytest.mark.filterwarnings("ignore")

_FRAMES: dict[str, object] = {"save_all": True}
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "jpeg": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "mpo": ("MPO", _FRAMES),
    "png": ("PNG", {}),
    "apng": ("PNG", _FRAMES),
    "gif": ("GIF", _FRAMES),
    "webp": ("WEBP", {}),
    "lossless": ("WEBP", {"lossless": True, **_FRAMES}),
    "avif": ("AVIF", {}),
    "tiff": ("TIFF", {}),
    "lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "deflate": ("TIFF", {"compression": "tiff_adobe_deflate", **_FRAMES}),
    "tiff_jpeg": ("TIFF", {"compression": "jpeg"}),
    "jp2": ("JPEG2000", {}),
    "j2k": ("JPEG2000", {"no_jp2": True}),
    "bmp": ("BMP", {}),
    "ppm": ("PPM", {}),
    "ico": ("ICO", {}),
    "tga": ("TGA", {}),
    "pcx": ("PCX", {}),
    "dds": ("DDS", {}),
    "sgi": ("SGI", {}),
    "blp": ("BLP", {}),
}


def _encoded(kind: str) -> bytes:
    name, options = KINDS[kind]
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow knows no AVIF")
    slope = np.add.outer(np.arange(48), np.arange(48))[:, :, None] * [1, 2, 3] % 256
    picture = Image.fromarray(slope.astype(np.uint8)).convert("P" if name == "BLP" else "RGB")
    if "save_all" in options:
        options = {**options, "append_images": [picture.rotate(90)]}
    buffer = io.BytesIO()
    picture.save(buffer, format=name, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_pictures(kind: str) -> None:
    assert decode(_encoded(kind)).size == (48, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_pictures(kind: str) -> None:
    content, draw = _encoded(kind), random.Random(kind)
    failed = 0
    for number in range(90):
        damaged = bytearray(content)
        if number % 3 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            for _ in range(draw.randint(1, 8)):
                damaged[draw.randrange(200 if number % 3 == 1 else len(damaged)) % len(damaged)] = draw.randrange(256)
        try:
            decode(bytes(damaged))
        except PictureError as error:
            failed += 1
            assert "\n" not in str(error)
            assert " at 0x" not in str(error)
            assert not is_machine_error(error)
    assert failed > 5


def test_no_picture_at_all() -> None:
    for content, words in ((b"", "^the file is empty$"), (b"no image", "^cannot identify its format$")):
        with pytest.raises(PictureError, match=words):
            decode(content)


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PictureError, match="exceeds limit of 2000 pixels"):
        decode(_encoded("png"))


def test_a_decoder_that_sets_errno_when_it_reads_the_file_itself(tmp_path: Path) -> None:
    content = bytearray(_encoded("jp2"))
    content[12:28] = (1).to_bytes(4, "big") + b"free" + (2**62).to_bytes(8, "big")  # a box that ends far outside
    path = tmp_path / "a.jp2"
    path.write_bytes(content)
    with pytest.raises(OSError, match="Invalid argument"), Image.open(path) as picture:
        picture.load()
    with pytest.raises(PictureError):
        decode(path.read_bytes())


@contextmanager
def _little_memory(room: int) -> Iterator[None]:
    """At most so many bytes more than there are."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_decoders_hide_that_memory_is_short() -> None:
    content = _encoded("progressive")[:400]
    with _little_memory(1 << 26), pytest.raises(MemoryError, match="128 MiB could not be had"):
        decode(content)
    with pytest.raises(PictureError, match="truncated"):
        decode(content)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "")])
def test_errors_of_the_machine_pass(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    content = _encoded("png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(error)) as found:
        decode(content)
    assert found.value is error
    assert is_machine_error(error)
    assert not is_machine_error(OSError("image file is truncated"))
