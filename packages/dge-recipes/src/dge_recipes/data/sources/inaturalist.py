"""iNaturalist 2018, 2019 and 2021, through torchvision."""

import json
from pathlib import Path

from PIL import Image
from torchvision.datasets import INaturalist

from dge_recipes.errors import UserError

__all__ = ["INaturalistSource"]


class INaturalistSource:
    """One half of an iNaturalist competition's images, labelled by species.

    Torchvision knows the two halves of 2021 apart. Before, both lie in one folder, and the published lists
    ``trainYEAR.json`` and ``valYEAR.json`` say which image belongs where.

    Args:
        root: holds the folders that torchvision unpacks and, before 2021, the two lists.
        year: 2018, 2019 or 2021.
        train: the training images, else the validation images.

    Raises:
        UserError: the files are not there.
    """

    def __init__(self, root: Path, year: int, train: bool) -> None:
        version = str(year) if year < 2021 else f"2021_{'train' if train else 'valid'}"
        if not (root / version).is_dir():
            raise UserError(f"iNaturalist {year} is not at {root}; expected the folder {root / version}")
        try:
            data = INaturalist(str(root), version=version, download=False)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"iNaturalist {year} at {root / version}: {error}") from error
        self.num_classes = len(data.all_categories)
        # Torchvision lists folders in the order of the file system, which differs between machines.
        files = sorted((f"{data.all_categories[label]}/{file}", label) for label, file in data.index)
        if year < 2021:
            listed = _listed(root / f"{'train' if train else 'val'}{year}.json")
            files = [(file, label) for file, label in files if file in listed]
            if len(files) < len(listed):
                missing = sorted(listed - {file for file, _ in files})
                raise UserError(f"{root / version} lacks {len(missing)} listed images, for example {missing[0]}")
        self._root, self._files = root / version, files

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """Path of the file."""
        return str(self._root / self._files[index][0])

    def label(self, index: int) -> int:
        """The species."""
        return self._files[index][1]

    def read(self, index: int) -> Image.Image:
        """Decode the file."""
        with Image.open(self._root / self._files[index][0]) as image:
            image.load()
            return image


def _listed(path: Path) -> set[str]:
    """The images of a published list, as CATEGORY/SPECIES/FILE."""
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        return {"/".join(image["file_name"].split("/")[-3:]) for image in images}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; expected the competition's list of its images") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a list of images: {error}") from error
