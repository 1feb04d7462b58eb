"""CIFAR-10 and CIFAR-100, through torchvision."""

from pathlib import Path
from typing import Literal

from PIL import Image

from dge_recipes.data.image_files import LeftOut
from dge_recipes.data.section import ImageData, ImageSource, Part
from dge_recipes.errors import UserError

__all__ = ["CifarData", "CifarSource"]


class CifarData(ImageData):
    """CIFAR-10 or CIFAR-100 as torchvision reads it: root/cifar-10-batches-py or root/cifar-100-python."""

    name: Literal["cifar10", "cifar100"]

    def open(self, part: Part) -> ImageSource:
        """The images of a part."""
        return CifarSource(self.folder, self.name, part == "train")


class CifarSource:
    """One half of a CIFAR data set, in memory.

    Args:
        root: holds ``cifar-10-batches-py`` or ``cifar-100-python``. Torchvision checks the files' MD5 sums
            before it unpickles them.
        name: which of the two.
        train: the 50000 training images, else the 10000 test images.

    Raises:
        UserError: the files are not there or not the published ones.
    """

    def __init__(self, root: Path, name: Literal["cifar10", "cifar100"], train: bool) -> None:
        from torchvision.datasets import CIFAR10, CIFAR100  # late: it is slow to import

        kind = CIFAR10 if name == "cifar10" else CIFAR100
        try:
            self._data = kind(str(root), train=train, download=False)
        except (RuntimeError, OSError) as error:
            files = f"{root / kind.base_folder}, unpacked from {kind.filename}"
            raise UserError(f"{name} is not at {root}, or damaged; expected {files}") from error
        self._where = f"{root / kind.base_folder}: {'training' if train else 'test'} image"
        self.classes: list[str] | None = list(self._data.classes)
        self.num_classes, self.left_out = len(self._data.classes), LeftOut()

    def __len__(self) -> int:
        return len(self._data.targets)

    def name(self, index: int) -> str:
        """The folder, and the image's number."""
        return f"{self._where} {index}"

    def entry(self, index: int) -> str:
        """The image's number: torchvision has checked that the files are the published ones."""
        return str(index)

    def label(self, index: int) -> int:
        """The fine label."""
        return int(self._data.targets[index])

    def read(self, index: int) -> Image.Image:
        """32 x 32 RGB."""
        return Image.fromarray(self._data.data[index])
