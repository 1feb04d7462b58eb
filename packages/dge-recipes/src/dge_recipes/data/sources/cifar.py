"""CIFAR-10 and CIFAR-100, through torchvision."""

from pathlib import Path
from typing import Literal

from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from dge_recipes.errors import UserError

__all__ = ["CifarSource"]


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
        kind = CIFAR10 if name == "cifar10" else CIFAR100
        try:
            self._data = kind(str(root), train=train, download=False)
        except (RuntimeError, OSError) as error:
            files = f"{root / kind.base_folder}, unpacked from {kind.filename}"
            raise UserError(f"{name} is not at {root}, or damaged; expected {files}") from error
        self._where = f"{root / kind.base_folder}: {'training' if train else 'test'} image"
        self.num_classes = len(self._data.classes)

    def __len__(self) -> int:
        return len(self._data.targets)

    def name(self, index: int) -> str:
        """The folder, and the image's number."""
        return f"{self._where} {index}"

    def label(self, index: int) -> int:
        """The fine label."""
        return int(self._data.targets[index])

    def read(self, index: int) -> Image.Image:
        """32 x 32 RGB."""
        return Image.fromarray(self._data.data[index])
