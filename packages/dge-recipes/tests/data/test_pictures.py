"""Folders of pictures without classes: what is found, and which tenth of it is held out."""

from pathlib import Path

import pytest
from sample_images import picture

from dge_recipes.config import PicturesData, load_config
from dge_recipes.data import build_data, build_held_out
from dge_recipes.data.image_sets import open_source, plain_images
from dge_recipes.data.section import ImageSource, Part
from dge_recipes.errors import UserError


def _write(root: Path, count: int) -> None:
    for number in range(count):
        path = root / ("flat.png" if number == 0 else f"holiday {number % 3}/day/{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))


def _open(root: Path, part: Part, **keys: float) -> ImageSource:
    return PicturesData(name="pictures", root=str(root), image_size=32, workers=0, **keys).open(part)  # type: ignore[arg-type]


def _entries(source: ImageSource) -> list[str]:
    return [source.entry(index) for index in range(len(source))]


def test_a_tenth_is_held_out_wherever_the_folder_lies(tmp_path: Path) -> None:
    for root in (tmp_path / "a", tmp_path / "b"):
        _write(root, 40)
    train, held_out = _open(tmp_path / "a", "train"), _open(tmp_path / "a", "val")
    assert (len(train), len(held_out)) == (36, 4)
    both = _entries(train) + _entries(held_out)
    assert len(set(both)) == 40
    assert "flat.png" in both
    assert "holiday 1/day/1.png" in both
    assert _entries(train) == sorted(_entries(train))
    assert _entries(_open(tmp_path / "b", "val")) == _entries(held_out)
    assert len(_open(tmp_path / "a", "val", held_out=0.5)) == 20
    at = 2
    number = 0 if held_out.entry(at) == "flat.png" else int(Path(held_out.entry(at)).stem)
    assert held_out.read(at).getpixel((0, 0)) == (number, 3 * number % 256, 9)
    assert held_out.name(at) == str(tmp_path / "a" / held_out.entry(at))


def test_pictures_that_are_added_move_few_others(tmp_path: Path) -> None:
    _write(tmp_path, 40)
    before = set(_entries(_open(tmp_path, "val")))
    (tmp_path / "new.png").write_bytes(picture(3))
    after = set(_entries(_open(tmp_path, "val")))
    assert len(after) == 4
    assert len(before & after) >= 3


def test_at_least_one_is_on_either_side(tmp_path: Path) -> None:
    _write(tmp_path, 2)
    for share in (0.01, 0.99):
        assert [len(_open(tmp_path, part, held_out=share)) for part in ("train", "val")] == [1, 1]


def test_a_file_counts_once_whatever_links_lead_to_it(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    (tmp_path / "again.png").symlink_to(tmp_path / "flat.png")
    (tmp_path / "holiday 1" / "up").symlink_to(tmp_path)
    sources = _open(tmp_path, "train"), _open(tmp_path, "val")
    assert sum(map(len, sources)) == 5
    names = [Path(source.name(index)).resolve() for source in sources for index in range(len(source))]
    assert len(set(names)) == 5


def test_other_files_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, 3)
    for name in ("1.heic", "notes.txt", ".hidden.png", "holiday 1/._1.png"):
        (tmp_path / name).write_bytes(b"no picture")
    source = open_source(PicturesData(name="pictures", root=str(tmp_path)), "train")
    assert len(source) == 2
    assert source.left_out.as_dict() == {".heic": 1, ".txt": 1}
    assert caplog.messages[0].startswith("train: 2 files were left out: 1 .heic, 1 .txt")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone does not exist; expected a folder of pictures"):
        _open(tmp_path / "gone", "train")
    (tmp_path / "file.png").write_bytes(picture(1))
    with pytest.raises(UserError, match=r"file.png is no folder; expected a folder of pictures"):
        _open(tmp_path / "file.png", "train")
    with pytest.raises(UserError, match=r"holds one picture; expected at least two, as one is held out"):
        _open(tmp_path, "val")
    (tmp_path / "file.png").rename(tmp_path / "file.heic")
    with pytest.raises(UserError, match=r"holds no picture that Pillow opens, beside 1 .heic; expected at least two"):
        _open(tmp_path, "train")


def test_what_needs_labels_refuses_pictures_and_the_rest_takes_them(tmp_path: Path) -> None:
    _write(tmp_path, 10)
    pictures = ["data.name=pictures", f"data.root={tmp_path}", "data.image_size=32"]
    with pytest.raises(UserError, match=r"data\.name=pictures serves distillation; got task=classification"):
        load_config("deit_tiny_256", pictures)
    data = PicturesData(name="pictures", root=str(tmp_path), image_size=32)
    config = load_config("deit_tiny_256").model_copy(update={"data": data})
    words = r"data.name: got pictures, which have no labels; .* such as imagefolder \(dge-compress takes pictures\)"
    with pytest.raises(UserError, match=words):
        build_data(config, 1)
    with pytest.raises(UserError, match=words):
        build_held_out(config)
    images = plain_images(config, "val")
    image, label = images.images[0]
    assert (image.shape, label, images.identify().num_images) == ((3, 32, 32), 0, 1)
