"""WebDataset shards."""

import json
import tarfile
from pathlib import Path

import pytest
from sample_images import add, picture

from dge_recipes.config import WebDatasetData
from dge_recipes.data.sources.webdataset import WebDatasetSource
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
