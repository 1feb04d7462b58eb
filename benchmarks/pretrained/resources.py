"""Photographs out of Qt's resource files, which hold WebP files as they are."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

__all__ = ["unpack_photographs"]

_START, _KIND = b"RIFF", b"WEBP"
_LEAST = 128  # pixels of the short side


def unpack_photographs(files: Sequence[Path], folder: Path) -> None:
    """Write the opaque pictures of some resource files as ``STEM_NNN.webp``: those with an alpha channel are drawn.

    Args:
        files: Qt's ``.rcc`` files, whose compression is none.
        folder: to write to; it is there afterwards with all of them, or not at all.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for file in files:
        for number, content in enumerate(_webp_files(file.read_bytes())):
            with Image.open(io.BytesIO(content)) as picture:
                wanted = picture.mode == "RGB" and min(picture.size) >= _LEAST
            if wanted:
                (partial / f"{file.stem}_{number:03}.webp").write_bytes(content)
    partial.rename(folder)


def _webp_files(content: bytes) -> Iterator[bytes]:
    place = content.find(_START)
    while place >= 0:
        (size,) = struct.unpack("<I", content[place + 4 : place + 8].ljust(4, b"\0"))
        whole = content[place : place + 8 + size]
        if whole[8:12] == _KIND and len(whole) == 8 + size:
            yield whole
        place = content.find(_START, place + 4)
