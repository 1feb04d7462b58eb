"""A folder with one folder of images per class."""

import os
from pathlib import Path
from typing import Literal

from PIL import Image

from dge_recipes.data.decoding import decode
from dge_recipes.data.image_files import LeftOut, extension, image_extensions, is_hidden, visible_files
from dge_recipes.data.section import ImageData, ImageSource, Part
from dge_recipes.errors import UserError

__all__ = ["FolderSource", "ImageFolderData"]

_NAMED = 3  # classes in a message


class ImageFolderData(ImageData):
    """root/train/CLASS/IMAGE and root/val/CLASS/IMAGE, as ImageNet is usually laid out."""

    name: Literal["imagefolder"]

    def open(self, part: Part) -> ImageSource:
        """The images of a part."""
        return FolderSource(self.folder / part)


class FolderSource:
    """Images at FOLDER/CLASS/IMAGE or in folders below, classes in alphabetical order.

    Args:
        folder: for example ``root/train``.

    Raises:
        UserError: no such folder, or a class folder without images.
    """

    def __init__(self, folder: Path) -> None:
        layout = f"expected {folder.parent}/train/CLASS/IMAGE and {folder.parent}/val/CLASS/IMAGE"
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist; {layout}")
        names = _class_names(folder)
        if not names:
            raise UserError(f"data folder {folder} holds no class folders; {layout}")
        from torchvision.datasets.folder import make_dataset  # late: it is slow to import

        choice, places = _Choice(folder), {name: place for place, name in enumerate(names)}
        try:
            self._samples: list[tuple[str, int]] = make_dataset(str(folder), places, is_valid_file=choice.takes)
        except FileNotFoundError as error:  # a class without images
            raise UserError(f"data folder {folder}: {choice.lacking()}") from error
        for entry in sorted(folder.iterdir()):
            if entry.is_file() and not is_hidden(entry.name):
                choice.left_out.add(str(entry))
        self.left_out = choice.left_out
        self._below = len(str(folder)) + 1
        self.classes: list[str] | None = names
        self.num_classes = len(names)

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        """Path of the file."""
        return self._samples[index][0]

    def entry(self, index: int) -> str:
        """CLASS/IMAGE."""
        return self._samples[index][0][self._below :]

    def label(self, index: int) -> int:
        """Place of the class in :attr:`classes`."""
        return self._samples[index][1]

    def read(self, index: int) -> Image.Image:
        """Decode the file."""
        return decode(Path(self._samples[index][0]).read_bytes())


def _class_names(folder: Path | str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


class _Choice:
    """Which files are images; remembers the others, and the classes that have one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._extensions = folder, image_extensions()
        self._start, self._classes = len(os.path.join(folder, "")), set[str]()
        self.left_out = LeftOut()

    def takes(self, path: str) -> bool:
        """Whether a file in a class folder is an image."""
        inside = path[self._start :]
        if is_hidden(inside):
            return False
        if extension(path) not in self._extensions:
            self.left_out.add(path)
            return False
        self._classes.add(inside.partition("/")[0])
        return True

    def lacking(self) -> str:
        """Which classes have no image, and what they hold."""
        empty = [name for name in _class_names(self._folder) if name not in self._classes]
        told = []
        for name in empty[:_NAMED]:
            held = LeftOut()
            for path in visible_files(self._folder / name):
                held.add(path)
            told.append(f"{name} ({held})")
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        return f"no images that Pillow opens in the class folders {', '.join(told)}{more}"
