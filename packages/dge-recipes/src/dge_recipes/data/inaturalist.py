"""iNaturalist 2018, 2019 and 2021."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field

from dge_recipes.data.decoding import decode
from dge_recipes.data.image_files import LeftOut, extension, image_extensions, is_hidden
from dge_recipes.data.section import ImageData, ImageSource, Part
from dge_recipes.errors import UserError

__all__ = ["INaturalistData", "INaturalistSource"]

_PIECES_2021 = 8  # number, kingdom, phylum, class, order, family, genus, species


class INaturalistData(ImageData):
    """iNaturalist as torchvision reads it: root/YEAR and, before 2021, root/trainYEAR.json and valYEAR.json."""

    name: Literal["inaturalist"]
    year: Literal[2018, 2019, 2021] = Field(default=2018, description="year of the competition (iNaturalist)")

    def open(self, part: Part) -> ImageSource:
        """The images of a part."""
        return INaturalistSource(self.folder, self.year, part == "train")


class INaturalistSource:
    """One half of an iNaturalist competition's images, labelled by species.

    The folders are those of the published archives, which torchvision unpacks too. The two halves of 2021 have one
    each. Before, both lie in one, and the published lists ``trainYEAR.json`` and ``valYEAR.json`` say which image
    belongs where.

    Args:
        root: holds the folders and, before 2021, the two lists.
        year: 2018, 2019 or 2021.
        train: the training images, else the validation images.

    Raises:
        UserError: the files are not there, or their folders are not the published ones.
    """

    def __init__(self, root: Path, year: int, train: bool) -> None:
        version = str(year) if year < 2021 else f"2021_{'train' if train else 'valid'}"
        folder = root / version
        if not folder.is_dir():
            raise UserError(f"iNaturalist {year} is not at {root}; expected the folder {folder}")
        try:
            species = _species_2021(folder) if year == 2021 else _species(folder)
        except OSError as error:
            raise UserError(f"iNaturalist {year} at {folder} cannot be read: {error}") from error
        self.classes: list[str] | None = list(species)
        self.num_classes, self.left_out = len(species), LeftOut()
        # File systems list folders in orders that differ between machines.
        files = sorted(
            (f"{name}/{file}", label) for label, name in enumerate(species) for file in _names(folder / name)
        )
        if year < 2021:
            files = _only_listed(files, folder, root / f"{'train' if train else 'val'}{year}.json")
        else:
            files = self._only_images(files, folder)
        if not files:
            raise UserError(f"{folder} holds no images; left out: {self.left_out}")
        self._root, self._files = folder, files

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """Path of the file."""
        return str(self._root / self._files[index][0])

    def entry(self, index: int) -> str:
        """CATEGORY/SPECIES/FILE, or SPECIES/FILE."""
        return self._files[index][0]

    def label(self, index: int) -> int:
        """The species."""
        return self._files[index][1]

    def read(self, index: int) -> Image.Image:
        """Decode the file."""
        return decode((self._root / self._files[index][0]).read_bytes())

    def _only_images(self, files: Sequence[tuple[str, int]], folder: Path) -> list[tuple[str, int]]:
        extensions = image_extensions()
        for file, _ in files:
            if extension(file) not in extensions:
                self.left_out.add(f"{folder}/{file}")
        return [(file, label) for file, label in files if extension(file) in extensions]


def _names(folder: Path, *, folders: bool = False) -> list[str]:
    """Files, or else folders, directly in a folder."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir() == folders)


def _species_2021(folder: Path) -> list[str]:
    """The folders of the classes, by number: 00000_Animalia_Annelida_... and so on."""
    names = _names(folder, folders=True)
    for number, name in enumerate(names):
        pieces = name.split("_")
        if pieces[0] != f"{number:05d}" or len(pieces) != _PIECES_2021:
            raise UserError(f"{folder}: got the folder {name}, expected {number:05d} and seven names with _ between")
    return names


def _species(folder: Path) -> list[str]:
    """The folders of the classes, by number: Plantae/0 and so on."""
    found: dict[int, str] = {}
    for group in _names(folder, folders=True):
        for name in _names(folder / group, folders=True):
            if not name.isdecimal():
                raise UserError(f"{folder}: got the folder {group}/{name}, expected the number of a class")
            if int(name) in found:
                raise UserError(f"{folder}: {found[int(name)]} and {group}/{name} are the same class")
            found[int(name)] = f"{group}/{name}"
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise UserError(f"{folder} has no folder for class {missing[0]}")
    return [found[number] for number in range(len(found))]


def _only_listed(files: Sequence[tuple[str, int]], folder: Path, path: Path) -> list[tuple[str, int]]:
    """The images of a half. The others are the other half's, so none are left out."""
    listed = _listed(path)
    files = [(file, label) for file, label in files if file in listed]
    if len(files) < len(listed):
        missing = sorted(listed - {file for file, _ in files})
        raise UserError(f"{folder} lacks {len(missing)} listed images, for example {missing[0]}")
    return files


def _listed(path: Path) -> set[str]:
    """The images of a published list, as CATEGORY/SPECIES/FILE."""
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        return {"/".join(image["file_name"].split("/")[-3:]) for image in images}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; expected the competition's list of its images") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a list of images: {error}") from error
