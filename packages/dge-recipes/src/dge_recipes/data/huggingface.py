"""A Hugging Face data set on disk. The ``datasets`` package is optional."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field

from dge_recipes.data.decoding import decode
from dge_recipes.data.image_files import LeftOut
from dge_recipes.data.section import ImageData, ImageSource, Part
from dge_recipes.errors import UserError

__all__ = ["HuggingFaceData", "HuggingFaceSource"]


class HuggingFaceData(ImageData):
    """A Hugging Face data set that ``save_to_disk`` wrote; needs the ``datasets`` package."""

    name: Literal["huggingface"]
    train_split: str = Field(default="train", description="split to train on (huggingface)")
    held_out_split: str = Field(default="validation", description="split to evaluate on (huggingface)")
    image_column: str = Field(default="image", description="column of the images (huggingface)")
    label_column: str = Field(default="label", description="column of the labels (huggingface)")

    def open(self, part: Part) -> ImageSource:
        """The images of a part."""
        return HuggingFaceSource(self, self.train_split if part == "train" else self.held_out_split)


class HuggingFaceSource:
    """One split of a data set that ``DatasetDict.save_to_disk`` wrote.

    The image column holds images as ``datasets.Image`` does, the label column class numbers from 0. Every row is used,
    whatever its file was called.

    Args:
        config: where it is and what its columns are called.
        split: which part of it.

    Raises:
        UserError: the package is not installed, nothing is there, a split or column is missing, or a column does
            not hold what it should.
    """

    classes: list[str] | None = None

    def __init__(self, config: HuggingFaceData, split: str) -> None:
        self._where, self.left_out = f"{config.folder}: {split}", LeftOut()
        rows = _open(config.folder, split)
        for column in (config.image_column, config.label_column):
            if column not in rows.column_names:
                raise UserError(f"{self._where} has no column {column!r}; it has {', '.join(rows.column_names)}")
        self._image, feature = config.image_column, rows.features[config.image_column]
        kind = type(feature).__name__
        if kind != "Image":
            raise UserError(f"{self._where}: column {self._image!r} holds {kind}, expected datasets.Image")
        # One column, so that no other is read with it; without the format that the rows were saved with; and as bytes,
        # because the package's own decoding turns pictures by their EXIF orientation.
        self._rows = rows.with_format(None).select_columns([self._image])
        self._rows = self._rows.cast_column(self._image, type(feature)(decode=False))
        self._mode: str | None = getattr(feature, "mode", None)
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

    def entry(self, index: int) -> str:
        """Path and size of the encoded image, as far as the row has them."""
        return self._entries[index]

    @cached_property
    def _entries(self) -> list[str]:
        import pyarrow.compute as arrow  # type: ignore[import-not-found, import-untyped, unused-ignore]

        column = self._rows.data.column(self._image)  # decodes nothing, and reads no image
        paths = arrow.struct_field(column, "path").to_pylist()
        sizes = arrow.binary_length(arrow.struct_field(column, "bytes")).to_pylist()
        return [f"{path or ''}:{size}" for path, size in zip(paths, sizes, strict=True)]

    def label(self, index: int) -> int:
        """The label column."""
        return self._labels[index]

    def read(self, index: int) -> Image.Image:
        """Decode the image column."""
        cell: dict[str, Any] | None = self._rows[index][self._image]
        if cell is None:
            raise ValueError("the row holds no image")
        content: bytes | None = cell["bytes"]
        picture = decode(Path(cell["path"]).read_bytes() if content is None else content)
        return picture if self._mode is None else picture.convert(self._mode)

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
