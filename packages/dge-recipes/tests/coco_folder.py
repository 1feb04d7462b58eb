"""Writes a small data set of COCO's format from the format's description, without the package that is tested."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["CATEGORIES", "column_runs", "compressed", "ring", "write_coco"]

# Ids have gaps, and are not in the order of the names.
CATEGORIES = {7: "Äpfel", 1: "box", 90: "猫"}
_KINDS = ("plain", "grey", "cmyk", "palette", "turned")
_NAMES = {1: "grey.jpg", 2: "cmyk.jpg", 3: "palette.png", 4: "turned.jpg", 6: "картина.png", 7: "sub/Größe 7.png"}


def column_runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of 0 and 1, in turn and beginning with 0, down the columns of a mask [H, W]."""
    pixels = np.concatenate([[0], mask.astype(np.uint8).flatten(order="F"), [2]])
    ends = np.flatnonzero(pixels[1:] != pixels[:-1])
    runs = np.diff(np.concatenate([[0], ends])).tolist()
    return runs if len(mask) and ends[0] < mask.size else [mask.size]


def compressed(runs: list[int]) -> str:
    """COCO's text for run lengths: differences to the run before the last, in groups of five bits."""
    text = []
    for place, run in enumerate(runs):
        left = run - (runs[place - 2] if place > 2 else 0)
        more = True
        while more:
            bits, left = left & 31, left >> 5
            more = left != (-1 if bits & 16 else 0)
            text.append(chr(bits + (32 if more else 0) + 48))
    return "".join(text)


def ring(width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """A mask [height, width] of a box with a hole, which no polygon describes."""
    picture = Image.new("L", (width, height))
    pen = ImageDraw.Draw(picture)
    left, top, right, bottom = box
    pen.ellipse((left, top, right - 1, bottom - 1), fill=1)
    pen.ellipse((left + (right - left) // 3, top + (bottom - top) // 3, right - 8, bottom - 8), fill=0)
    return np.asarray(picture)


def write_coco(root: Path, count: int = 12, *, side: int = 64, seed: int = 0) -> None:
    """train2017, val2017 and annotations below a folder: crowds, images without objects, polygons, run lengths of both
    kinds, ids with gaps, names in several alphabets, pictures of several modes."""
    for part in ("train", "val"):
        folder = root / f"{part}2017"
        (folder / "sub").mkdir(parents=True)
        content = _part(folder, count, side, np.random.default_rng([seed, part == "val"]))
        (root / "annotations").mkdir(exist_ok=True)
        path = root / "annotations" / f"instances_{part}2017.json"
        path.write_text(json.dumps(content, ensure_ascii=part == "train"), encoding="utf-8")


def _part(folder: Path, count: int, side: int, numbers: np.random.Generator) -> dict[str, Any]:
    images, annotations = [], []
    for place in range(count):
        width, height = side + 8 * (place % 3), side + 4 * (place % 4)
        name = _NAMES.get(place, f"{place:03}.png")
        kind = _KINDS[place] if place < len(_KINDS) else "plain"
        image_id = 1000 - 37 * place
        images.append({"id": image_id, "file_name": name, "width": width, "height": height, "license": 1})
        picture = Image.new("RGB", (width, height), tuple(numbers.integers(0, 60, 3).tolist()))
        if place not in (5, 9):  # without objects
            for _ in range(int(numbers.integers(1, 4))):
                annotation = _object(picture, len(annotations), numbers)
                annotations.append({**annotation, "image_id": image_id})
        _save(picture, folder / name, kind)
    # One crowd, on an image that has objects beside it.
    crowd = next(each for each in images if each["id"] == annotations[-1]["image_id"])
    mask = np.zeros((crowd["height"], crowd["width"]), np.uint8)
    mask[2:30, 3:40] = 1
    mask[10:14, 5:20] = 0
    annotations.append(
        {
            **{"id": 5000, "image_id": crowd["id"], "category_id": 1, "iscrowd": 1, "area": int(mask.sum())},
            **{"bbox": [3, 2, 37, 28], "segmentation": {"size": list(mask.shape), "counts": column_runs(mask)}},
        }
    )
    categories = [{"id": number, "name": name, "supercategory": "thing"} for number, name in CATEGORIES.items()]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def _object(picture: Image.Image, number: int, numbers: np.random.Generator) -> dict[str, Any]:
    """Draws an object and describes it."""
    pen, color = ImageDraw.Draw(picture), tuple(numbers.integers(120, 255, 3).tolist())
    width, height = numbers.integers(12, picture.width // 2, 2).tolist()
    left, top = int(numbers.integers(0, picture.width - width)), int(numbers.integers(0, picture.height - height))
    box = [left, top, width, height]
    if number % 3 == 0:
        mask = ring(picture.width, picture.height, (left, top, left + width, top + height))
        picture.paste(color, mask=Image.fromarray(mask * 255))
        segmentation: Any = {"size": list(mask.shape), "counts": compressed(column_runs(mask))}
        area = float(mask.sum())
    else:
        half = width / 2
        parts = [[left, top, left + half - 1, top, left + half - 1, top + height, left, top + height]]
        parts.append([left + half + 1, top + 0.5, left + width, top, left + width, top + height])
        for each in parts if number % 3 == 1 else parts[:1]:
            pen.polygon([*zip(each[::2], each[1::2], strict=True)], fill=color)
        segmentation = parts if number % 3 == 1 else parts[:1]
        box = box if number % 3 == 1 else [left, top, half - 1, height]
        area = 0.7 * box[2] * box[3]  # areas are those of the annotations, not of the boxes
    category = list(CATEGORIES)[number % len(CATEGORIES)]
    return {
        **{"id": 10 + number, "category_id": category, "bbox": box, "area": area, "iscrowd": 0},
        "segmentation": segmentation,
    }


def _save(picture: Image.Image, path: Path, kind: str) -> None:
    if kind == "grey":
        picture.convert("L").save(path)
    elif kind == "cmyk":
        picture.convert("CMYK").save(path)
    elif kind == "palette":
        picture.convert("P").save(path)
    elif kind == "turned":  # the pixels as they are stored have the size that the file of annotations says
        exif = Image.Exif()
        exif[0x0112] = 3
        picture.save(path, exif=exif)
    else:
        picture.save(path)
