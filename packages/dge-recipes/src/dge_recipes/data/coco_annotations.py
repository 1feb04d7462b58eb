"""Reads a JSON file of COCO's format into arrays: millions of small Python objects would be copied by every worker."""

import gc
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dge_recipes.data.decoding import decode
from dge_recipes.data.image_files import LeftOut
from dge_recipes.errors import UserError

__all__ = ["CocoAnnotations", "CocoObjects"]

_LISTS = ("images", "annotations", "categories")
_SHOWN = 3


@dataclass(frozen=True)
class CocoObjects:
    """The objects of an image.

    Attributes:
        boxes: float64 [N, 4], left, top, right and bottom edge in pixels.
        labels: int64 [N], from 1, by ascending category id.
        crowds: bool [N], whether a box stands for a crowd.
        areas: float64 [N], in pixels, as the file says.
        segmentations: of each object its polygons or run lengths; None where they were not kept.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowds: NDArray[np.bool_]
    areas: NDArray[np.float64]
    segmentations: list[Any] | None


class CocoAnnotations:
    """The images that a JSON file of COCO's format names, in the order of their ids, and the objects in them.

    Args:
        file: the JSON file.
        folder: of the images.
        training: clean as torchvision's recipe does: crowds are left out, boxes end at the image's edge, and those
            without area are left out. For evaluation all stays as it is.
        drop_empty: leave images out that then show no object.
        segmentations: keep the polygons and run lengths.

    Attributes:
        classes: names of the categories, by ascending id.
        cleaned: what was cleaned, in words, and how many of it.
        left_out: nothing: which of the folder's images are used, the file says.

    Raises:
        UserError: a file is missing, the JSON is none or not of this format, or there is no image.
    """

    def __init__(
        self, file: Path, folder: Path, *, training: bool, drop_empty: bool = False, segmentations: bool = False
    ) -> None:
        self._file, self._folder, self.left_out = file, folder, LeftOut()
        with _no_collection():
            self._take(_read(file), training, drop_empty, segmentations)

    def _take(self, content: dict[str, list[Any]], training: bool, drop_empty: bool, segmentations: bool) -> None:
        """Turn the lists of the file into arrays."""
        file = self._file
        categories = self._by_id(content["categories"], "categories", {"name": str})
        self.classes = [category["name"] for category in categories.values()]
        for name in self.classes:
            if self.classes.count(name) > 1:
                raise UserError(f"{file}: two categories are called {name!r}")
        images = self._by_id(content["images"], "images", {"file_name": str, "width": int, "height": int})
        if not images:
            raise UserError(f"{file} names no images")
        self._names = [image["file_name"] for image in images.values()]
        self._sizes = np.array([(image["width"], image["height"]) for image in images.values()])
        self._paths = self._find(self._names)
        table = self._table(content["annotations"], list(images), list(categories))
        self.cleaned: dict[str, int] = {}
        keep = self._clean(table) if training else np.ones(len(table), bool)
        order = np.flatnonzero(keep)[np.argsort(table[keep, 0], kind="stable")]
        self._table_of_objects = table[order]
        self._segmentations = (
            _Texts([self._segmentation(content["annotations"][row]) for row in order]) if segmentations else None
        )
        self._starts = np.searchsorted(self._table_of_objects[:, 0], np.arange(len(images) + 1))
        self._places = np.arange(len(images))
        if drop_empty:
            self._places = np.flatnonzero(np.diff(self._starts))
            self._count("images without objects were left out", len(images) - len(self._places))
            if not len(self._places):
                raise UserError(f"{file}: none of the {len(images)} images shows an object to train on")

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """Path of the image."""
        return str(self._folder / self._paths[self._places[index]])

    def read(self, index: int) -> Image.Image:
        """Decode the file."""
        return decode(Path(self.name(index)).read_bytes())

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of an image in pixels, as the file says."""
        width, height = self._sizes[self._places[index]].tolist()
        return width, height

    def entry(self, index: int) -> str:
        """The image's name in the file, and a digest of its objects."""
        place = self._places[index]
        rows = self._table_of_objects[self._starts[place] : self._starts[place + 1], 1:]
        return f"{self._names[place]}:{hashlib.blake2b(rows.tobytes(), digest_size=8).hexdigest()}"

    def labels(self, index: int) -> NDArray[np.int64]:
        """Labels int64 [N] of an image's objects, from 1."""
        place = self._places[index]
        return self._table_of_objects[self._starts[place] : self._starts[place + 1], 5].astype(np.int64)

    def objects(self, index: int) -> CocoObjects:
        """The objects of an image, in the order of the file."""
        place = self._places[index]
        rows = range(self._starts[place], self._starts[place + 1])
        part = self._table_of_objects[rows.start : rows.stop]
        texts = self._segmentations
        kept = None if texts is None else [texts[row] for row in rows]
        return CocoObjects(part[:, 1:5], part[:, 5].astype(np.int64), part[:, 6].astype(bool), part[:, 7], kept)

    def _by_id(self, entries: list[Any], what: str, keys: Mapping[str, type]) -> dict[Any, dict[str, Any]]:
        """The entries of one of the file's lists by ascending id, once all have what they need."""
        found: dict[Any, dict[str, Any]] = {}
        for number, each in enumerate(entries):
            where = f"{self._file}: {what}[{number}]"
            if not isinstance(each, dict) or not isinstance(each.get("id"), int | str):
                raise UserError(f"{where} has no id")
            if each["id"] in found:
                raise UserError(f"{where}: the id {each['id']!r} is taken twice")
            for key, kind in keys.items():
                value = each.get(key)
                if not isinstance(value, kind) or (isinstance(value, int) and value < 1):
                    raise UserError(f"{where} (id {each['id']!r}): got {key} {value!r}, expected {_KINDS[kind]}")
            found[each["id"]] = each
        return dict(sorted(found.items(), key=lambda item: (isinstance(item[0], str), item[0])))

    def _find(self, names: Sequence[str]) -> list[str]:
        """The files of the images below the folder; file systems spell names of the same letters in different ways."""
        if not self._folder.is_dir():
            raise UserError(f"data folder {self._folder} does not exist; {self._file} names images in it")
        there = {
            os.path.relpath(os.path.join(parent, name), self._folder)
            for parent, _, files in os.walk(self._folder, followlinks=True)
            for name in files
        }
        spelled = {unicodedata.normalize("NFC", name): name for name in there}
        paths, missing = [], []
        for name in names:
            plain = os.path.normpath(name)
            found = plain if plain in there else spelled.get(unicodedata.normalize("NFC", plain))
            paths.append(found or name)
            if found is None and not (self._folder / name).is_file():  # it may lead out of the folder
                missing.append(name)
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise UserError(f"{self._folder} lacks {', '.join(missing[:_SHOWN])}{more}, which {self._file} names")
        return paths

    def _table(self, annotations: list[Any], images: list[Any], categories: list[Any]) -> NDArray[np.float64]:
        """A row for each annotation: place of the image, left, top, right, bottom, label, crowd, area."""
        places = {number: place for place, number in enumerate(images)}
        labels = {number: place + 1 for place, number in enumerate(categories)}
        rows = []
        for number, each in enumerate(annotations):
            try:
                left, top, width, height = map(float, each["bbox"])
                area = float(each.get("area", width * height))
                crowd = float(bool(each.get("iscrowd", 0)))
                place, label = places[each["image_id"]], labels[each["category_id"]]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(self._fault(number, each, places, labels)) from error
            rows.append((place, left, top, left + width, top + height, label, crowd, area))
        table = np.array(rows, np.float64).reshape(-1, 8)
        wrong = np.flatnonzero(~np.isfinite(table).all(1))
        if len(wrong):
            raise UserError(self._fault(int(wrong[0]), annotations[wrong[0]], places, labels))
        return table

    def _fault(self, number: int, annotation: Any, places: Mapping[Any, int], labels: Mapping[Any, int]) -> str:
        """What is wrong with an annotation."""
        told = f"{self._file}: annotations[{number}]"
        if not isinstance(annotation, dict):
            return f"{told}: got {type(annotation).__name__}, expected a mapping"
        told += f" (id {annotation.get('id')!r})"
        for key, known, what in (("image_id", places, "images"), ("category_id", labels, "categories")):
            value = annotation.get(key)
            if not isinstance(value, int | str) or value not in known:
                return f"{told}: got {key} {value!r}, which none of the {what} has"
        shown = {key: annotation.get(key) for key in ("bbox", "area") if key in annotation}
        return f"{told}: got {shown or 'no bbox'}, expected bbox [left, top, width, height] and area in pixels"

    def _segmentation(self, annotation: dict[str, Any]) -> Any:
        if "segmentation" not in annotation:
            raise UserError(
                f"{self._file}: the annotation {annotation.get('id')!r} has no segmentation to take a mask from"
            )
        return annotation["segmentation"]

    def _clean(self, table: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Cut boxes at the edges of their images, in place; which rows a detector can be trained on."""
        boxes, crowds = table[:, 1:5], table[:, 6] != 0
        cut = np.clip(boxes, 0, np.tile(self._sizes[table[:, 0].astype(np.int64)], 2))
        keep = ~crowds & (cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1])
        # COCO's own boxes overshoot by rounding; that is not worth a word.
        self._count("boxes were cut at their image's edge", int((keep & (np.abs(boxes - cut).max(1) >= 1)).sum()))
        self._count("boxes without area were left out", int((~keep & ~crowds).sum()))
        table[:, 1:5] = cut
        return keep

    def _count(self, what: str, number: int) -> None:
        if number:
            self.cleaned[what] = number


_KINDS = {str: "a text", int: "a whole number from 1"}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Inside ``with``, Python does not look for garbage, which takes as long as reading millions of objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"annotations {file} do not exist; data.train_annotations and data.val_annotations say where they are"
        ) from error
    except OSError as error:
        raise UserError(f"annotations {file} cannot be read: {error}") from error
    except ValueError as error:
        raise UserError(f"annotations {file} are no JSON: {error}") from error
    for name in _LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(
                f"annotations {file}: expected a mapping with the lists {', '.join(_LISTS)}; {name} is none"
            )
    return content


class _Texts:
    """A list of what JSON can hold, as one array of bytes."""

    def __init__(self, values: Sequence[Any]) -> None:
        texts = [json.dumps(value, separators=(",", ":")).encode() for value in values]
        self._ends = np.cumsum([0, *map(len, texts)])
        self._bytes = np.frombuffer(b"".join(texts), np.uint8)

    def __getitem__(self, index: int) -> Any:
        return json.loads(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())
