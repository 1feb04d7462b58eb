"""Pictures in a folder, without classes: nested or flat, a fixed tenth of them held out."""

import hashlib
import os
import unicodedata
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from PIL import Image
from pydantic import Field

from dge_recipes.data.decoding import decode
from dge_recipes.data.image_files import LeftOut, extension, image_extensions, visible_files
from dge_recipes.data.section import ImageData, ImageSource, Part, Share
from dge_recipes.errors import UserError
from dge_recipes.sections import Count

__all__ = ["PicturesData", "PicturesSource"]

_FEWEST = 2  # one to look at, and one to hold out


class PicturesData(ImageData):
    """root/ANY/PATH/IMAGE, without labels: what ``dge-compress`` looks at, and distillation learns from."""

    labelled: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("distillation",)

    name: Literal["pictures"]
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1,
        description="share of the pictures that is held out, at least one; the paths of the pictures decide which "
        "(pictures)",
    )
    # Few pictures have to stand for many: their details too, and near as well as far.
    crop_scale: tuple[Share, Share] = Field(
        default=(0.15, 1.0),
        strict=False,
        description="training: smallest and largest share of an image's area that a random crop shows",
    )
    crops: Count = Field(
        default=1, description="training: random crops that an epoch takes of every picture (pictures)"
    )

    def open(self, part: Part) -> ImageSource:
        """The pictures of a part."""
        return PicturesSource(self.folder, part, self.held_out)


class PicturesSource:
    """The pictures in a folder and in those below it, in the order of their paths.

    A hash of a picture's path below the folder decides whether it is held out. So the parts depend on nothing else,
    whatever comes first in the folder, and a picture that is added moves few of the others. A file that links lead to
    by several paths counts once.

    All pictures have the label 0, of one class without a name: who needs labels refuses the whole data set.

    Args:
        folder: holds the pictures.
        part: which of them.
        held_out: share of the pictures that ``val`` has.

    Raises:
        UserError: no such folder, or fewer than two pictures in it.
    """

    classes: list[str] | None = None
    num_classes = 1

    def __init__(self, folder: Path, part: Part, held_out: float) -> None:
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "does not exist"
            raise UserError(f"data.root: {folder} {what}; expected a folder of pictures")
        self.left_out = LeftOut()
        self._folder = folder
        entries = self._pictures()
        if len(entries) < _FEWEST:
            held = f", beside {self.left_out}" if self.left_out.total() else ""
            found = "no picture that Pillow opens" if not entries else "one picture"
            raise UserError(f"data.root: {folder} holds {found}{held}; expected at least two, as one is held out")
        count = min(max(round(held_out * len(entries)), 1), len(entries) - 1)
        chosen = set(sorted(entries, key=_rank)[:count])
        self._entries = [entry for entry in entries if (entry in chosen) == (part == "val")]

    def _pictures(self) -> list[str]:
        """Paths below the folder, with ``/`` between their parts."""
        extensions, start, met, entries = image_extensions(), len(os.path.join(self._folder, "")), set[str](), []
        for path in visible_files(self._folder):
            if extension(path) not in extensions:
                self.left_out.add(path)
                continue
            real = os.path.realpath(path)
            if real not in met:
                met.add(real)
                entries.append(path[start:].replace(os.sep, "/"))
        return sorted(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """Path of the file."""
        return os.path.join(self._folder, self._entries[index])

    def entry(self, index: int) -> str:
        """Path below the folder."""
        return self._entries[index]

    def label(self, index: int) -> int:
        """0: there are no classes."""
        return 0

    def read(self, index: int) -> Image.Image:
        """Decode the file."""
        return decode(Path(self.name(index)).read_bytes())


def _rank(entry: str) -> bytes:
    """Where a picture stands among those that may be held out; file systems spell names in several Unicode forms."""
    text = unicodedata.normalize("NFC", entry)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() + os.fsencode(entry)
