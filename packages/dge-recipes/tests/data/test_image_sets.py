"""CIFAR and iNaturalist data through the ``data`` section, and what is said when they are not there."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_images import picture, write_folder, write_json
from torchvision.datasets import CIFAR100

from dge_recipes.config import CifarData, ImageFolderData, INaturalistData
from dge_recipes.data.image_sets import check_same_classes, open_source
from dge_recipes.data.section import ImageSource
from dge_recipes.errors import UserError


def _all(source: ImageSource) -> list[tuple[int, int]]:
    return [(source.read(i).convert("RGB").getpixel((0, 0))[0], source.label(i)) for i in range(len(source))]  # type: ignore[index]


def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CifarData(name="cifar100", root=str(tmp_path), num_classes=100)
    with pytest.raises(UserError, match=r"cifar100 is not at .*cifar-100-python, unpacked from cifar-100-python.tar"):
        open_source(config, "train")
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    contents: dict[str, dict[str, Any]] = {"meta": {"fine_label_names": [str(i) for i in range(100)]}}
    for part, labels in (("train", [7, 3]), ("test", [99])):
        pixels = np.repeat(np.array(labels, dtype=np.uint8)[:, None], 3 * 32 * 32, axis=1)
        contents[part] = {"data": pixels, "fine_labels": labels}
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    assert _all(open_source(config, "train")) == [(7, 7), (3, 3)]
    assert _all(open_source(config, "val")) == [(99, 99)]
    (folder / "train").write_bytes(b"damaged")
    with pytest.raises(UserError, match="or damaged"):
        open_source(config, "train")


def test_inaturalist_2018_follows_the_published_lists(tmp_path: Path) -> None:
    config = INaturalistData(name="inaturalist", root=str(tmp_path))
    with pytest.raises(UserError, match=r"iNaturalist 2018 is not at .*; expected the folder .*2018"):
        open_source(config, "train")
    files = {"Birds/1/b.png": 11, "Birds/1/a.png": 10, "Frogs/0/c.png": 20, "Frogs/0/d.png": 21}
    for name, number in files.items():
        path = tmp_path / "2018" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    with pytest.raises(UserError, match=r"train2018.json does not exist; expected the competition's list"):
        open_source(config, "train")
    for part, names in (("train", ("Birds/1/a.png", "Birds/1/b.png", "Frogs/0/d.png")), ("val", ("Frogs/0/c.png",))):
        images = [{"id": i, "file_name": f"train_val2018/{name}"} for i, name in enumerate(names)]
        write_json(tmp_path / f"{part}2018.json", {"images": images})
    assert _all(open_source(config, "train")) == [(10, 1), (11, 1), (21, 0)]
    assert _all(open_source(config, "val")) == [(20, 0)]
    (tmp_path / "2018" / "Birds" / "1" / "b.png").unlink()
    with pytest.raises(UserError, match=r"lacks 1 listed images, for example Birds/1/b.png"):
        open_source(config, "train")


def test_numbers_of_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, ("a", "b"))
    config = ImageFolderData(name="imagefolder", root=str(tmp_path), num_classes=3)
    with pytest.raises(UserError, match=r"\(train\) has 2 classes; data.num_classes says 3"):
        open_source(config, "train")
    train = open_source(config.model_copy(update={"num_classes": 2}), "train")
    write_folder(tmp_path / "other", ("a", "b", "c"))
    other = open_source(ImageFolderData(name="imagefolder", root=str(tmp_path / "other")), "val")
    with pytest.raises(UserError, match=r"must hold the same classes, but differ in \['c'\]"):
        check_same_classes(train, other)
