"""Small data sets of every kind, made for tests."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

__all__ = ["add", "picture", "write_folder", "write_json"]


def picture(number: int, kind: str = "PNG") -> bytes:
    """An encoded image, told apart from others by its first pixel's red."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 50), (number, 3 * number % 256, 9)).save(buffer, format=kind)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A file in a tar file."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 3) -> None:
    """root/train/CLASS/IMAGE and root/val/CLASS/IMAGE."""
    for part in ("train", "val"):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                (folder / f"{index}.png").write_bytes(picture(100 * label + index))


def write_json(path: Path, content: object) -> None:
    """A JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")
