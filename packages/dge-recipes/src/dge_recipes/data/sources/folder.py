"""A folder with one folder of images per class."""

from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from dge_recipes.errors import UserError

__all__ = ["FolderSource"]


class FolderSource:
    """Images at FOLDER/CLASS/IMAGE, classes in alphabetical order.

    Args:
        folder: for example ``root/train``.

    Raises:
        UserError: no such folder, or a class folder without images.
    """

    def __init__(self, folder: Path) -> None:
        layout = f"expected {folder.parent}/train/CLASS/IMAGE and {folder.parent}/val/CLASS/IMAGE"
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist; {layout}")
        if not any(entry.is_dir() for entry in folder.iterdir()):
            raise UserError(f"data folder {folder} holds no class folders; {layout}")
        try:
            found = ImageFolder(str(folder))
        except FileNotFoundError as error:  # torchvision names the classes without images
            raise UserError(f"data folder {folder}: {error}") from error
        self._samples: list[tuple[str, int]] = found.samples
        self.classes: list[str] = found.classes
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        """Path of the file."""
        return self._samples[index][0]

    def label(self, index: int) -> int:
        """Place of the class in :attr:`classes`."""
        return self._samples[index][1]

    def read(self, index: int) -> Image.Image:
        """Decode the file."""
        with Image.open(self._samples[index][0]) as image:
            image.load()
            return image
