"""What is an image by its name: all that Pillow decodes, and nothing else."""

from pathlib import Path

import pytest
from PIL import Image

from dge_recipes.data.image_files import extension, image_extensions, is_hidden, visible_files


def test_what_pillow_decodes_is_an_image() -> None:
    found = image_extensions()
    assert {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".tif", ".tiff"} <= found
    assert {".webp", ".jp2", ".ppm", ".pgm", ".pbm", ".ico", ".tga", ".psd", ".qoi"} <= found
    assert all(each == each.lower() and each.startswith(".") for each in found)


@pytest.mark.parametrize("other", [".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"])
def test_what_pillow_knows_but_cannot_decode_itself_is_none(other: str) -> None:
    assert other in Image.registered_extensions()
    assert other not in image_extensions()


def test_other_files_are_none() -> None:
    assert not {"", ".", ".pdf", ".palm", ".svg", ".npy", ".txt", ".json", ".cls", ".tar", ".heic"} & image_extensions()


@pytest.mark.filterwarnings("ignore:IM image format is deprecated:DeprecationWarning")
def test_what_pillow_writes_under_such_a_name_it_reads(tmp_path: Path) -> None:
    """All of them with their extensions, but those that take some modes or sizes alone."""
    written = 0
    for suffix in image_extensions() - {".icns", ".blp", ".msp", ".xbm", ".pfm", ".ftc", ".ftu"}:
        path, kind = tmp_path / f"a{suffix}", Image.registered_extensions()[suffix]
        if kind in Image.SAVE:
            mode = {"GIF": "P"}.get(kind, "RGB")
            Image.new(mode, (64, 64)).save(path, format=kind)
            with Image.open(path) as image:
                image.load()
                assert image.size == (64, 64)
            written += 1
    assert written > 20


def test_formats_that_a_plugin_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    image_extensions()
    monkeypatch.setitem(Image.OPEN, "NEW", (Image.Image, None))
    monkeypatch.setitem(Image.EXTENSION, ".new", "NEW")
    assert ".new" in image_extensions()


def test_extensions() -> None:
    names = ("a/b.JPG", "a.b/c", "a.depth.png", "a.tar.gz", "README", "a.", ".hidden", "a/.png")
    assert [extension(name) for name in names] == [".jpg", "", ".png", ".gz", "", "", "", ""]


def test_hidden_names() -> None:
    hidden = ("._a.png", "a/._b.png", ".DS_Store", "a/.DS_Store", "__MACOSX/a/._b.png", ".git/a.png", "a/@eaDir/b.jpg")
    assert all(map(is_hidden, hidden))
    assert not any(map(is_hidden, ("a.png", "./a.png", "../a.png", "_a.png", "a./b.png", "MACOSX/a.png", "")))


def test_visible_files_in_one_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.txt", "a.png", ".git/x", "b/.y", "b/c/._1.png", "b/c/3", "__MACOSX/b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(visible_files(tmp_path)) == [str(tmp_path / name) for name in ("a.png", "b/1.txt", "b/2.png", "b/c/3")]
    assert list(visible_files(tmp_path / "nowhere")) == []
