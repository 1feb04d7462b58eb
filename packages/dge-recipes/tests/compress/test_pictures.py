"""Pictures to calibrate on and to measure on."""

from pathlib import Path

import pytest
from small_models import draw_pictures

from dge_recipes.compress.pictures import pictures_section, read_pictures, spread
from dge_recipes.config import PicturesData
from dge_recipes.errors import UserError

_VIEW = {"image_size": 32, "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def _section(folder: Path, *overrides: str) -> PicturesData:
    return pictures_section(folder, _VIEW, overrides)


def test_pictures_are_taken_evenly() -> None:
    assert spread(6, 3) == [0, 2, 4]
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(0, 3) == spread(3, 0) == []


def test_the_held_out_tenth_is_not_calibrated_on(tmp_path: Path) -> None:
    found = read_pictures(_section(draw_pictures(tmp_path, 21)), batch_size=4, limit=100)
    assert [len(batch) for batch in found.calibration] == [4, 4, 4, 4, 3]
    assert [len(batch) for batch in found.held_out] == [2]
    assert found.held_out[0].shape == (2, 3, 32, 32)
    assert found.facts == {
        "folder": str(tmp_path),
        "found": 21,
        "calibration": 19,
        "held_out": 2,
        "unreadable": [],
        "left_out": {},
    }
    assert not any(
        (batch == image).flatten(1).all(1).any() for batch in found.calibration for image in found.held_out[0]
    )


def test_a_limit(tmp_path: Path) -> None:
    found = read_pictures(_section(draw_pictures(tmp_path, 30), "data.held_out=0.5"), batch_size=8, limit=5)
    assert (found.facts["calibration"], found.facts["held_out"], found.facts["found"]) == (5, 5, 30)


def test_unreadable_pictures(tmp_path: Path) -> None:
    draw_pictures(tmp_path, 30)
    for name in ("bad.png", "worse.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot be read as an image: .*set data.unreadable=skip"):
        read_pictures(_section(tmp_path), batch_size=4, limit=100)
    found = read_pictures(_section(tmp_path, "data.unreadable=skip"), batch_size=4, limit=100)
    assert found.facts["calibration"] + found.facts["held_out"] == 30
    assert sorted(Path(line.split(" cannot be read")[0]).name for line in found.facts["unreadable"]) == [
        "bad.png",
        "worse.png",
    ]


def test_too_many_unreadable_ones_are_listed(tmp_path: Path) -> None:
    draw_pictures(tmp_path, 3)
    for number in range(30):
        (tmp_path / f"bad{number}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"allows 10; mend those that (\S+) lists") as caught:
        read_pictures(_section(tmp_path, "data.unreadable=skip"), batch_size=4, limit=100)
    listed = Path(str(caught.value).split("mend those that ")[1].split(" lists")[0])
    assert listed.read_text(encoding="utf-8").count("\n") == 11
    listed.unlink()
    listed.parent.rmdir()


def test_none_that_can_be_read(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"bad{number}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 3 pictures to calibrate on can be read"):
        read_pictures(_section(tmp_path, "data.unreadable=skip"), batch_size=4, limit=100)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=x", r"got 'model.name=x'; expected data.key=value"),
        ("data.root=x", r"the folder is --images"),
        ("data.exif", r"got 'data.exif'; expected data.key=value"),
        ("data.exif=maybe", r"data: .*'exif': got 'maybe'"),
        ("data.foo=1", r"data: unknown key: 'foo'"),
    ],
)
def test_overrides(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _section(tmp_path, override)
    assert _section(tmp_path, "data.exif=true").exif
