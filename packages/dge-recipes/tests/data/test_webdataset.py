"""WebDataset shards."""

import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError
from sample_images import add, picture

from dge_recipes.config import WebDatasetData
from dge_recipes.data.webdataset import WebDatasetSource
from dge_recipes.errors import UserError


def _shard(path: Path, samples: dict[str, tuple[int, bytes | None]], kind: str = "cls") -> None:
    with tarfile.open(path, "w") as tar:
        for key, (number, label) in samples.items():
            add(tar, f"{key}.jpg", picture(number, "JPEG"))
            if label is not None:
                add(tar, f"{key}.{kind}", label)


def _source(root: Path, **options: object) -> WebDatasetSource:
    config = WebDatasetData.model_validate({"name": "webdataset", "root": str(root), **options})
    return WebDatasetSource(config, config.train_shards)


def test_labels_in_either_form_and_keys_that_repeat_between_shards(tmp_path: Path) -> None:
    _shard(tmp_path / "train-001.tar", {"x/0001": (200, b"2\n"), "x/0000": (100, b"0")})
    label = json.dumps({"label": 1, "text": "a dog"}).encode()
    _shard(tmp_path / "train-000.tar", {"x/0000": (50, label)}, kind="json")
    source = _source(tmp_path)
    assert (len(source), source.num_classes) == (3, 3)
    assert [source.label(index) for index in range(3)] == [1, 0, 2]
    reds = [source.read(index).getpixel((0, 0))[0] for index in range(3)]  # type: ignore[index]
    assert reds == pytest.approx([50, 100, 200], abs=3)
    assert source.name(0) == f"{tmp_path / 'train-000.tar'}: x/0000.jpg"


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no WebDataset shards at .*train\*.tar"):
        _source(tmp_path)
    _shard(tmp_path / "train.tar", {"7": (1, None)})
    with pytest.raises(UserError, match=r"7 has no label; expected a number in 7.cls, or in 7.json as 'label'"):
        _source(tmp_path)
    _shard(tmp_path / "train.tar", {"7": (1, b"5")})
    with pytest.raises(UserError, match="got label 5, expected 0 to 2"):
        _source(tmp_path, num_classes=3)


def _write(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)


def _pictures(*names: str) -> list[tuple[str, bytes]]:
    """Members, each an image of its own red: 10, 20, ..."""
    return [(name, picture(10 * number)) for number, name in enumerate(names, 1)]


def _taken(root: Path, *names: str, **options: object) -> list[str]:
    """Which of these images of key 7, all in one sample, are taken."""
    _write(root / "train.tar", [*_pictures(*names), ("7.cls", b"0"), ("7.txt", b"a caption")])
    source = _source(root, **options)
    return [source.name(index).rpartition(": ")[2] for index in range(len(source))]


def test_one_extension_wins_over_several(tmp_path: Path) -> None:
    for names in (("7.jpg", "7.depth.png"), ("7.a.png", "7.png"), ("7.JPG", "7.depth.png", "7.seg.gif")):
        assert _taken(tmp_path, *names) == [min(names, key=len)]
        assert _source(tmp_path).left_out.as_dict() == {}
    assert _taken(tmp_path, "7.rgb.png") == ["7.rgb.png"]
    assert _source(tmp_path).read(0).getpixel((0, 0)) == (10, 30, 9)


@pytest.mark.parametrize(
    "names",
    [
        ("7.jpg", "7.png"),
        ("7.gif", "7.jpeg", "7.depth.png"),
        ("7.rgb.png", "7.depth.png"),
        ("7.JPG", "7.jpg"),
        ("7.jpg", "7.jpg"),
        ("7.left.jpg", "7.left.JPG"),
    ],
)
def test_ambiguous_images(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as raised:
        _taken(tmp_path, *names)
    told = str(raised.value)
    assert f"{tmp_path / 'train.tar'}: 7 has several images, " in told
    assert "data.image_key=" in told
    assert all(name in told for name in names if name.count(".") == min(each.count(".") for each in names))


def test_which_part_is_the_image(tmp_path: Path) -> None:
    names = ("7.jpg", "7.RGB.png", "7.depth.png", "7.png")
    for image_key, taken in (("jpg", 0), ("JPG", 0), (".jpg", 0), ("rgb.png", 1), ("depth.PNG", 2), ("png", 3)):
        assert _taken(tmp_path, *names, image_key=image_key) == [names[taken]]
    _write(tmp_path / "train.tar", [("7.image", picture(5)), ("7.depth.png", picture(6)), ("7.cls", b"0")])
    assert _source(tmp_path, image_key="image").read(0).getpixel((0, 0)) == (5, 15, 9)
    with pytest.raises(ValidationError, match="image_key"):
        _source(tmp_path, image_key="")


def test_samples_that_lack_the_part(tmp_path: Path) -> None:
    label = ("8.cls", b"0")
    _write(tmp_path / "train.tar", [*_pictures("7.rgb.png", "8.depth.png"), ("7.cls", b"0"), label])
    with pytest.raises(UserError, match=r"train\.tar: 8 has no 'rgb\.png', .*data\.image_key.*; it has 8\.depth\.png"):
        _source(tmp_path, image_key="rgb.png")
    _write(tmp_path / "train.tar", [*_pictures("7.rgb.png", "7.depth.png"), ("7.cls", b"0"), label])
    source = _source(tmp_path, image_key="rgb.png")
    assert (len(source), source.left_out.as_dict()) == (1, {".cls": 1})


def test_another_image_does_not_take_the_place_of_one_that_was_lost(tmp_path: Path) -> None:
    labels = [("7.cls", b"0"), ("8.cls", b"0")]
    _write(tmp_path / "train-0.tar", [*_pictures("7.jpg", "7.depth.png"), labels[0]])
    _write(tmp_path / "train-1.tar", [*_pictures("8.depth.png"), labels[1]])
    with pytest.raises(
        UserError, match=r"0\.tar: 7\.jpg is the image of one sample and .*8\.depth\.png of another; .*key"
    ):
        _source(tmp_path)
    _write(tmp_path / "train-1.tar", [*_pictures("8.PNG"), labels[1]])
    assert len(_source(tmp_path)) == 2


def test_keys_in_folders_and_inner_tars(tmp_path: Path) -> None:
    members = [(f"{name}.cls", b"0") for name in ("v1.2/7", "v1.3/7", "7")]
    _write(tmp_path / "a.tar", [*_pictures("v1.2/7.png", "v1.3/7.png", "7.png"), *members])
    inner = (tmp_path / "a.tar").read_bytes()
    _write(tmp_path / "train.tar", [*_pictures("v1.2/7.png", "./v1.3/7.png", "7.png"), *members])
    assert len(_source(tmp_path)) == 3
    _write(tmp_path / "train.tar", [("x/a.tar", inner), ("y/a.tar", inner)])  # the same keys, of different samples
    assert len(_source(tmp_path)) == 6


def test_hidden_twins(tmp_path: Path) -> None:
    twins = [(name, b"twin") for name in ("._7.png", "._7.cls", ".DS_Store", "__MACOSX/7.png", "a/._b.png")]
    _write(tmp_path / "train.tar", [*_pictures("7.png"), ("7.cls", b"0"), *twins])
    (tmp_path / "._train.tar").write_bytes(b"twin")
    (tmp_path / ".old").mkdir()
    _write(tmp_path / ".old" / "train.tar", _pictures("7.png"))
    for shards in ("train*.tar", "*train.tar", "**/*.tar"):
        assert len(_source(tmp_path, train_shards=shards)) == 1
    _write(tmp_path / ".old" / "train.tar", [*_pictures("7.png", "8.png"), ("7.cls", b"0"), ("8.cls", b"0")])
    assert len(_source(tmp_path, train_shards=".old/*.tar")) == 2
    assert len(_source(tmp_path / ".old")) == 2


def test_labels_of_which_nobody_knows_the_right_one(tmp_path: Path) -> None:
    image = picture(1)
    for members, words in (
        ([("7.cls", b"0"), ("7.cls", b"1")], r"7 has several labels, 7\.cls, 7\.cls; expected one"),
        ([("7.cls", b"0"), ("7.CLS", b"0")], r"7 has several labels, 7\.CLS, 7\.cls; expected one"),
        ([("7.json", b"{}"), ("7.JSON", b"{}")], r"7 has several labels, 7\.JSON, 7\.json; expected one"),
        (
            [("7.cls", b"0"), ("7.json", b'{"label": 1}')],
            r"7\.cls says 0 and 7\.json says 1 for 'label'; expected one label, or data\.label_key=null to go",
        ),
    ):
        _write(tmp_path / "train.tar", [("7.png", image), *members])
        with pytest.raises(UserError, match=words):
            _source(tmp_path)
    assert _source(tmp_path, label_key=None).label(0) == 0
    for described in (b'{"label": 0}', b'{"label": 0.0}', b'{"label": "a dog"}', b'{"text": 1}', b"no JSON", b"[1]"):
        _write(tmp_path / "train.tar", [("7.PNG", image), ("7.Cls", b"0"), ("7.json", described)])
        assert _source(tmp_path).label(0) == 0


@pytest.mark.parametrize("label", [b"2.5", b"null", b"Infinity", b"NaN", b'"dog"', b"[3]"])
def test_labels_that_are_no_whole_numbers(tmp_path: Path, label: bytes) -> None:
    _write(tmp_path / "train.tar", [("7.png", picture(1)), ("7.json", b'{"label": ' + label + b"}")])
    with pytest.raises(UserError, match=r"7 has no label; expected a number in 7\.cls, or in 7\.json as 'label'"):
        _source(tmp_path)


def test_labels_in_json_that_are_not_to_be_read(tmp_path: Path) -> None:
    _write(tmp_path / "train.tar", [("7.png", picture(1)), ("7.json", b'{"label": 2}')])
    assert _source(tmp_path).label(0) == 2
    with pytest.raises(UserError, match=r"7 has no label; expected a number in 7\.cls$"):
        _source(tmp_path, label_key=None)


def test_no_images_at_all(tmp_path: Path) -> None:
    _write(tmp_path / "train.tar", [("7.cls", b"0"), ("7.heic", b""), ("8.heic", b"")])
    with pytest.raises(UserError, match=r"hold no images; left out: 2 \.heic, 1 \.cls"):
        _source(tmp_path)
    for shards in ("/data/*.tar", ""):
        with pytest.raises(
            UserError, match=rf"got '{re.escape(shards)}' for shards, expected a pattern below data.root"
        ):
            _source(tmp_path, train_shards=shards)
