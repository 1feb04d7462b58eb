"""The script beside an export prepares pictures as evaluation does, without this project."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dge_recipes.compress.pictures import pictures_section
from dge_recipes.config import PicturesData
from dge_recipes.data.decoding import decode
from dge_recipes.data.pixels import to_rgb
from dge_recipes.data.transforms import evaluation_transform
from dge_recipes.export.engine import describe_preprocessing
from dge_recipes.export.loader import loader_script

_VIEW: dict[str, Any] = {
    "image_size": 48,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


def _script(section: PicturesData, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script's names; what runs the model is left out."""
    described = {
        "preprocessing": describe_preprocessing(section),
        "classes": None,
        "inputs": [{"shape": [None, 3, 48, 48]}],
        "file": "model.pt2",
    }
    (folder / "model.json").write_text(json.dumps(described), encoding="utf-8")
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: None)
    names: dict[str, Any] = {"__name__": "classify", "__file__": str(folder / "classify.py")}
    exec(compile(loader_script("pt2", "classify.py", classifies=True), "classify.py", "exec"), names)
    return names


def _reader(section: PicturesData, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return _script(section, folder, monkeypatch)["read"]


def test_packages_get_the_strides_that_they_take_for_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _picture("RGB").save(tmp_path / "picture.png")
    names, given = _script(pictures_section(tmp_path, _VIEW, []), tmp_path, monkeypatch), []
    names["run"] = lambda pixels: (given.append(pixels), np.eye(len(pixels)))[1]
    assert names["main"]([str(tmp_path)]) == 0
    assert [(pixels.shape, pixels.flags.c_contiguous) for pixels in given] == [((1, 3, 48, 48), True)]


def _picture(mode: str, size: tuple[int, int] = (71, 93)) -> Image.Image:
    noise = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(noise.integers(0, 65536, size[::-1], dtype=np.uint16))
    picture = Image.fromarray(noise.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8))
    return picture.convert("RGB").quantize(16) if mode == "P" else picture.convert(mode)


@pytest.mark.parametrize("size", [(71, 93), (93, 71), (48, 48), (200, 55), (49, 1000)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
def test_the_same_numbers(
    size: tuple[int, int], interpolation: str, crop_pct: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = {**_VIEW, "interpolation": interpolation, "crop_pct": crop_pct}
    section = pictures_section(tmp_path, view, [])
    picture = _picture("RGB", size)
    picture.save(tmp_path / "picture.png")
    read = _reader(section, tmp_path, monkeypatch)(tmp_path / "picture.png")
    torch.testing.assert_close(torch.from_numpy(read), evaluation_transform(section)(picture), rtol=0, atol=1e-6)
    assert read.dtype == np.float32


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("L", "png"), ("1", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("I;16", "png")),
        *(("CMYK", "jpg"), ("L", "jpg"), ("RGB", "webp")),
    ],
)
def test_kinds_of_pictures(mode: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = pictures_section(tmp_path, _VIEW, [])
    path = tmp_path / f"picture.{kind}"
    _picture(mode).save(path, **({"transparency": 3} if mode == "P" else {}))
    expected = evaluation_transform(section)(to_rgb(decode(path.read_bytes())))
    read = _reader(section, tmp_path, monkeypatch)(path)
    torch.testing.assert_close(torch.from_numpy(read), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exif", [False, True])
def test_orientation(exif: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = pictures_section(tmp_path, _VIEW, [f"data.exif={str(exif).lower()}"])
    tags = Image.Exif()
    tags[0x0112] = 6
    path = tmp_path / "picture.png"
    _picture("RGB").save(path, exif=tags)
    expected = evaluation_transform(section)(to_rgb(decode(path.read_bytes()), upright=exif))
    read = _reader(section, tmp_path, monkeypatch)(path)
    torch.testing.assert_close(torch.from_numpy(read), expected, rtol=0, atol=1e-6)


def test_floating_point_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("F", (60, 60)).save(tmp_path / "picture.tiff")
    with pytest.raises(ValueError, match="its pixels are floating-point numbers"):
        _reader(pictures_section(tmp_path, _VIEW, []), tmp_path, monkeypatch)(tmp_path / "picture.tiff")


@pytest.mark.parametrize(("to", "runtime"), [("onnx", "onnxruntime"), ("openvino", "openvino"), ("pt2", "torch")])
@pytest.mark.parametrize("classifies", [True, False])
def test_it_imports_its_runtime_numpy_and_pillow(to: str, runtime: str, classifies: bool) -> None:
    tree = ast.parse(loader_script(to, "classify.py", classifies=classifies))
    names = {each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"json", "sys", "pathlib", "numpy", "PIL", runtime}
