"""A person's picture as dge-visualize sees it, and what it says of one that it cannot use."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from dge_recipes.config import load_config
from dge_recipes.errors import UserError
from dge_recipes.visualize import prepare


@pytest.mark.parametrize(("name", "keys"), [("deit_tiny_256", ["data.root=."]), ("shapes_dense", [])])
def test_a_phone_photo_is_turned(name: str, keys: list[str], tmp_path: Path) -> None:
    picture, exif = Image.new("RGB", (32, 32), "red"), Image.Exif()
    picture.paste("blue", (0, 16, 32, 32))
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    config = load_config(name, ["data.image_size=32", "output.dir=out", *keys])
    shown = prepare(tmp_path / "a.png", config)[1]
    assert shown.shape == (3, 32, 32)
    assert shown[:, 0, 0].tolist() == pytest.approx([0, 0, 1], abs=0.02)
    assert shown[:, -1, -1].tolist() == pytest.approx([1, 0, 0], abs=0.02)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(tmp_path / "a.png")
    config = load_config("deit_tiny_256", ["data.image_size=32", "data.root=.", "output.dir=out"])
    given, shown = prepare(tmp_path / "a.png", config)
    assert torch.allclose(shown, torch.ones(3, 32, 32))
    assert given.min() > 2  # white is far above the mean


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("deit_tiny_256", ["data.root=.", "output.dir=out"])
    (tmp_path / "empty.png").touch()
    (tmp_path / "no.png").write_bytes(b"no image")
    Image.new("F", (2, 2)).save(tmp_path / "float.tif")
    (tmp_path / "folder.png").mkdir()
    for name, words in (
        ("empty.png", "empty.png cannot be read as an image: the file is empty$"),
        ("no.png", "no.png cannot be read as an image: cannot identify its format$"),
        ("float.tif", "float.tif cannot be read as an image: its pixels are floating-point numbers"),
        ("gone.png", r"gone.png cannot be read: \[Errno 2\] No such file"),
        ("folder.png", r"folder.png cannot be read: \[Errno 21\] Is a directory"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(tmp_path / name, config)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")

    def refuse(*arguments: object) -> None:
        raise ValueError("refused")

    monkeypatch.setattr(Image.Image, "resize", refuse)
    with pytest.raises(UserError, match=r"a.png cannot be transformed: Resize: refused$"):
        prepare(tmp_path / "a.png", config)
