"""Which files are taken for images, by their names: one rule for every kind of storage and for ``dge-visualize``."""

import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageFile

__all__ = ["LeftOut", "extension", "image_extensions", "is_hidden", "visible_files"]

# Pillow runs Ghostscript for the first, and finds out no more than the size of the second.
_NOT_DECODED = {"EPS", "MPEG"}
# Pillow opens these files as another format.
_OPENED_AS_JPEG = {"MPO"}
# What macOS and Synology's file servers put beside pictures: their attributes, and small copies of them.
_TWINS = {"__MACOSX", "@eaDir"}


def image_extensions() -> frozenset[str]:
    """Extensions, such as ``.jpg``, of the formats that Pillow decodes itself, those of its plugins included.

    Formats that Pillow hands to another program are not among them (EPS, WMF, HDF5, GRIB and BUFR), nor are videos.
    """
    known = Image.registered_extensions()  # loads all of Pillow's formats
    decoded = {name for name, (factory, _) in Image.OPEN.items() if not _is_stub(factory)}
    decoded = (decoded | _OPENED_AS_JPEG) - _NOT_DECODED
    return frozenset(suffix for suffix, name in known.items() if name in decoded)


def _is_stub(factory: object) -> bool:
    """Whether Pillow knows the format and leaves decoding it to others."""
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


def extension(name: str) -> str:
    """The extension of a file's name or path in lower case, such as ``.jpg``; empty without one."""
    suffix = posixpath.splitext(name)[1].lower()
    return "" if suffix == "." else suffix


def is_hidden(path: str) -> bool:
    """Whether a relative path leads to or through something that is no data: ``.DS_Store``, ``._a.png``, ``__MACOSX``.

    Args:
        path: with ``/`` between its parts.
    """
    return any(part in _TWINS or (part[:1] == "." and part not in (".", "..")) for part in path.split("/"))


def visible_files(folder: Path) -> Iterator[str]:
    """Paths of all files in a folder and in those below it, in one order everywhere, without the hidden ones."""
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        yield from (os.path.join(parent, name) for name in sorted(files) if not is_hidden(name))


class LeftOut:
    """Files of a data set that are not used, counted by their extensions so that they can be told.

    Attributes:
        example: the first of the files; empty if there are none.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.example = ""

    def add(self, name: str, shown: str = "") -> None:
        """One more file.

        Args:
            name: its name or path.
            shown: what to call it; by default as `name` does.
        """
        self.example = self.example or shown or name
        self._counts[extension(name) or "without extension"] += 1

    def total(self) -> int:
        """Number of files."""
        return sum(self._counts.values())

    def as_dict(self) -> dict[str, int]:
        """Numbers by extension, the largest first."""
        return dict(sorted(self._counts.items(), key=lambda item: (-item[1], item[0])))

    def __str__(self) -> str:
        """In words, such as ``20 .heic, 4 .txt``."""
        return ", ".join(f"{count} {name}" for name, count in self.as_dict().items()) or "no files"

    def told(self, where: str) -> str:
        """One line for a warning.

        Args:
            where: what the files are left out of.
        """
        files = "1 file was" if self.total() == 1 else f"{self.total()} files were"
        return f"{where}: {files} left out: {self}; for example {self.example}"
