"""A Hugging Face data set on disk. The ``datasets`` package is optional."""

from pathlib import Path
from typing import Any

from PIL import Image

from dge_recipes.config.data_sets import HuggingFaceData
from dge_recipes.errors import UserError

__all__ = ["HuggingFaceSource"]


class HuggingFaceSource:
    """One split of a data set that ``DatasetDict.save_to_disk`` wrote.

    The image column holds images as ``datasets.Image`` does, the label column class numbers from 0.

    Args:
        config: where it is and what its columns are called.
        split: which part of it.

    Raises:
        UserError: the package is not installed, nothing is there, a split or column is missing, or a column does
            not hold what it should.
    """

    classes: list[str] | None = None

    def __init__(self, config: HuggingFaceData, split: str) -> None:
        self._where = f"{Path(config.root).expanduser()}: {split}"
        rows = _open(Path(config.root).expanduser(), split)
        for column in (config.image_column, config.label_column):
            if column not in rows.column_names:
                raise UserError(f"{self._where} has no column {column!r}; it has {', '.join(rows.column_names)}")
        # One column, so that no other is decoded with it; without the format that the rows were saved with.
        self._rows, self._image = rows.with_format(None).select_columns([config.image_column]), config.image_column
        kind = type(self._rows.features[self._image]).__name__
        if kind != "Image":
            raise UserError(f"{self._where}: column {self._image!r} holds {kind}, expected datasets.Image")
        names = getattr(rows.features[config.label_column], "names", None)
        self.classes = None if names is None else list(names)
        self._labels = self._class_numbers(rows, config.label_column)
        self.num_classes = (config.num_classes or max(self._labels) + 1) if names is None else len(names)
        wrong = [row for row, label in enumerate(self._labels) if not 0 <= label < self.num_classes]
        if wrong:
            got = f"{self.name(wrong[0])}: got label {self._labels[wrong[0]]}"
            raise UserError(f"{got}, expected 0 to {self.num_classes - 1}")

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        """The split, and the row."""
        return f"{self._where} row {index}"

    def label(self, index: int) -> int:
        """The label column."""
        return self._labels[index]

    def read(self, index: int) -> Image.Image:
        """Decode the image column."""
        image: Image.Image | None = self._rows[index][self._image]
        if image is None:
            raise ValueError("the row holds no image")
        image.load()
        return image

    def _class_numbers(self, rows: Any, column: str) -> list[int]:
        labels: list[Any] = rows.with_format(None)[column][:]  # at once; one by one is 100 times slower
        for row, label in enumerate(labels):
            if not isinstance(label, int):
                raise UserError(f"{self.name(row)}: got {label!r} in column {column!r}, expected a class number")
        return [int(label) for label in labels]


def _open(root: Path, split: str) -> Any:
    """The rows of a split."""
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise UserError("data.name=huggingface needs the datasets package: pip install datasets") from error
    if not root.is_dir():
        raise UserError(f"no Hugging Face data set on disk at {root}; expected what DatasetDict.save_to_disk wrote")
    try:
        found: Any = datasets.load_from_disk(str(root))
    except IndexError as error:  # what becomes of a split without files
        raise UserError(f"{root} holds a split without rows") from error
    except (OSError, ValueError, KeyError, TypeError) as error:  # files that are no such data set's
        raise UserError(f"no Hugging Face data set on disk at {root}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{root} is a single Dataset; expected a DatasetDict, such as {{'train': ..., {split!r}: ...}}")
    if split not in found:
        raise UserError(f"{root} has no split {split!r}; it has {', '.join(map(str, found))}")
    if len(found[split]) == 0:
        raise UserError(f"{root} holds a split without rows: {split}")
    return found[split]
