"""A Hugging Face data set on disk. The ``datasets`` package is optional."""

from pathlib import Path
from typing import Any

from PIL import Image

from dge_recipes.config.data_sets import HuggingFaceData
from dge_recipes.errors import UserError

__all__ = ["HuggingFaceSource"]


class HuggingFaceSource:
    """One split of a data set that ``DatasetDict.save_to_disk`` wrote.

    Args:
        config: where it is and what its columns are called.
        split: which part of it.

    Raises:
        UserError: the package is not installed, nothing is there, or a split or column is missing.
    """

    def __init__(self, config: HuggingFaceData, split: str) -> None:
        try:
            import datasets  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise UserError("data.name=huggingface needs the datasets package: pip install datasets") from error
        self._root, self._split = Path(config.root).expanduser(), split
        try:
            found: Any = datasets.load_from_disk(str(self._root))
        except (OSError, ValueError) as error:
            raise UserError(f"no Hugging Face data set on disk at {self._root}: {error}") from error
        if split not in found:
            raise UserError(f"{self._root} has no split {split!r}; it has {', '.join(map(str, found))}")
        self._rows, self._image = found[split], config.image_column
        for column in (config.image_column, config.label_column):
            if column not in self._rows.column_names:
                known = ", ".join(self._rows.column_names)
                raise UserError(f"{self._root} has no column {column!r}; it has {known}")
        self._labels = [int(label) for label in self._rows[config.label_column]]
        names = getattr(self._rows.features[config.label_column], "num_classes", None)
        self.num_classes = int(names) if names else max(self._labels) + 1

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        """The split, and the row."""
        return f"{self._root}: {self._split} row {index}"

    def label(self, index: int) -> int:
        """The label column."""
        return self._labels[index]

    def read(self, index: int) -> Image.Image:
        """Decode the image column."""
        image: Image.Image = self._rows[index][self._image]
        image.load()
        return image
