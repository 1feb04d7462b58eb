"""What a list of images comes to: the same wherever it lies, another as soon as anything in it changes."""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from sample_images import add, picture, write_folder, write_json

from dge_recipes.classes import Classes
from dge_recipes.config import load_config
from dge_recipes.data.identity import DataIdentity, identify, identify_images, tell_changes
from dge_recipes.data.image_sets import plain_images, training_images


def _identity(name: str, root: Path, *overrides: str) -> DataIdentity:
    config = load_config(
        "deit_tiny_256", [f"data.name={name}", f"data.root={root}", "data.num_classes=null", *overrides]
    )
    return plain_images(config, "train").identify()


def _write_tars(root: Path, images: dict[str, tuple[str, ...]], reverse: bool = False) -> None:
    """root/train/CLASS.tar, as ImageNet is published once unpacked; members in any order."""
    (root / "train").mkdir(parents=True, exist_ok=True)
    for name, files in images.items():
        with tarfile.open(root / "train" / f"{name}.tar", "w") as tar:
            for file in sorted(files, reverse=reverse):
                add(tar, file, picture(len(file)))


def _write_shards(root: Path, labels: dict[str, int]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for key, label in labels.items():
            add(tar, f"{key}.png", picture(7))
            add(tar, f"{key}.cls", str(label).encode())


def test_of_entries() -> None:
    entries = [("a/1", 0), ("b/1", 2), ("b/2", 2)]
    one = identify(entries, Classes(3, ("a", "x", "b")))
    assert (one.num_images, one.occurring, [count for count, _ in one.by_class]) == (3, [0, 2], [1, 0, 2])
    assert DataIdentity.from_dict(one.as_dict()) == one
    for other in (entries[::-1], entries[:2], [*entries, ("b/3", 2)], [("a/1", 2), *entries[1:]]):
        assert identify(other, one.classes).digest != one.digest
    assert identify([("strange_\udcff", 0)], Classes(1)).num_images == 1  # bytes in a file's name that are no text


def test_of_images_with_any_number_of_classes() -> None:
    classes = Classes(3, ("a", "b", "c"))
    entries = [("1", (0, 2)), ("2", ()), ("3", (2,))]
    before = identify_images(entries, classes)
    assert (before.num_images, [count for count, _ in before.by_class]) == (3, [1, 0, 2])
    assert DataIdentity.from_dict(before.as_dict()) == before
    others = [entries[::-1], [*entries, ("4", ())], [("1", (0, 1)), *entries[1:]], [("5", (0, 2)), *entries[1:]]]
    found = [identify_images(other, classes) for other in others]
    assert len({each.digest for each in (before, *found)}) == 5
    assert tell_changes(before, found[1]) == "there were 3 images and are 4"
    assert tell_changes(before, found[2]) == "class b had 0 images and has 1, class c had 2 images and has 1"
    unseen = [identify_images([(name, ())], classes) for name in "12"]
    assert tell_changes(*unseen) == "the images are others, or come in another order"


def test_changes_in_words() -> None:
    classes = Classes(5, ("ant", "bee", "cat", "dog", "eel"))
    entries = [(f"{label}/{number}", label) for label in range(5) for number in range(3)]
    before = identify(entries, classes)
    assert tell_changes(before, identify(entries[1:], classes)) == "class ant had 3 images and has 2"
    renamed = [("new", 4) if entry == ("4/1", 4) else entry for entry in entries]
    assert "class eel has other images, or the same in another order" in tell_changes(
        before, identify(renamed, classes)
    )
    assert tell_changes(before, identify(entries[3:] + entries[:3], classes)) == "the images come in another order"
    several = tell_changes(before, identify([entry for entry in entries if not entry[0].endswith("/1")], classes))
    assert several.endswith("class cat had 3 images and has 2, and 2 more")
    unnamed = identify(entries, Classes(5)), identify(entries[:-1], Classes(5))
    assert tell_changes(*unnamed) == "class 4 had 3 images and has 2"


def test_image_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "one", ("ant", "bee"))
    one = _identity("imagefolder", tmp_path / "one")
    assert (one.classes, one.num_images) == (Classes(2, ("ant", "bee")), 6)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert _identity("imagefolder", tmp_path / "moved") == one
    monkeypatch.chdir(tmp_path / "moved")
    assert _identity("imagefolder", Path()) == one
    (tmp_path / "moved" / "train" / "bee" / "2.png").rename(tmp_path / "moved" / "train" / "bee" / "3.png")
    other = _identity("imagefolder", Path())
    assert [mine == theirs for mine, theirs in zip(other.by_class, one.by_class, strict=True)] == [True, False]


def test_tar_files(tmp_path: Path) -> None:
    _write_tars(tmp_path / "one", {"ant": ("1.png", "2.png"), "bee": ("3.png",)})
    one = _identity("tar", tmp_path / "one")
    assert one.classes.names == ("ant", "bee")
    _write_tars(tmp_path / "two", {"ant": ("1.png", "2.png"), "bee": ("3.png",)}, reverse=True)  # other offsets
    assert _identity("tar", tmp_path / "two") == one
    with tarfile.open(tmp_path / "two" / "train" / "bee.tar", "w") as tar:
        add(tar, "3.png", picture(200, "JPEG"))  # another image of the same name
    assert _identity("tar", tmp_path / "two").digest != one.digest


def test_webdataset_has_numbers_alone(tmp_path: Path) -> None:
    _write_shards(tmp_path / "one", {"a": 0, "b": 2})
    one = _identity("webdataset", tmp_path / "one")
    assert (one.classes, one.occurring) == (Classes(3), [0, 2])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert _identity("webdataset", tmp_path / "two") == one
    _write_shards(tmp_path / "two", {"a": 2, "b": 0})
    assert _identity("webdataset", tmp_path / "two").digest != one.digest


def _save_rows(datasets: Any, root: Path, images: list[dict[str, Any]], labels: list[int]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    datasets.DatasetDict(train=rows).save_to_disk(str(root))


@pytest.mark.parametrize("paths", [True, False])
def test_hugging_face(tmp_path: Path, paths: bool) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    images = [{"bytes": picture(n, "JPEG") + bytes(n), "path": f"{n}.jpg" if paths else None} for n in range(4)]
    labels = [0, 1, 1, 0]
    _save_rows(datasets, tmp_path / "one", images, labels)
    one = _identity("huggingface", tmp_path / "one")
    assert (one.classes.names, [count for count, _ in one.by_class]) == (("ant", "bee"), [2, 2])
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert _identity("huggingface", tmp_path / "moved") == one
    _save_rows(datasets, tmp_path / "again", images, labels)
    assert _identity("huggingface", tmp_path / "again") == one
    order = [0, 2, 1, 3]  # two images of one class change places
    for name, rows in (("order", order), ("fewer", [0, 1, 2]), ("more", [0, 1, 2, 3, 3])):
        _save_rows(datasets, tmp_path / name, [images[row] for row in rows], [labels[row] for row in rows])
        assert _identity("huggingface", tmp_path / name).digest != one.digest
    _save_rows(datasets, tmp_path / "labels", images, [0, 1, 0, 0])
    assert _identity("huggingface", tmp_path / "labels").digest != one.digest


def test_inaturalist(tmp_path: Path) -> None:
    for place in ("one", "two"):
        for file in ("Birds/1/a.png", "Frogs/0/b.png"):
            path = tmp_path / place / "2018" / file
            path.parent.mkdir(parents=True)
            path.write_bytes(picture(1))
        images = [{"file_name": f"train_val2018/{name}"} for name in ("Birds/1/a.png", "Frogs/0/b.png")]
        write_json(tmp_path / place / "train2018.json", {"images": images})
    one, two = (_identity("inaturalist", tmp_path / place) for place in ("one", "two"))
    assert one == two
    assert one.classes.names is not None
    assert [name.split("/")[0] for name in one.classes.names] == ["Frogs", "Birds"]


def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        base_folder, filename, classes = "cifar", "cifar.tar", ["ant", "bee"]

        def __init__(self, root: str, *, train: bool, download: bool) -> None:
            self.targets = [0, 1, 1]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Two)
    one = _identity("cifar10", tmp_path)
    assert (one.classes.names, [count for count, _ in one.by_class]) == (("ant", "bee"), [1, 2])


@pytest.mark.parametrize("name", ["digits", "shapes_dense"])
def test_images_that_are_drawn(name: str) -> None:
    few = ["data.num_images=30", "data.held_out_images=20", "data.num_classes=10"] if name == "shapes_dense" else []
    config = load_config(name, few)
    train, plain, held_out = training_images(config), plain_images(config, "train"), plain_images(config, "val")
    assert train.identify() == train.identify() == plain.identify()
    assert (held_out.identify().num_images, held_out.identify().classes.count) == (len(held_out.images), 10)
    names = train.identify().classes.names
    assert names is not None
    assert names[:2] == (("0", "1") if name == "digits" else ("disc, plain", "ring, gradient"))


def test_noise_has_no_names() -> None:
    config = load_config("digits", ["data={name: random, image_size: 32, num_classes: 7, num_images: 20, channels: 1}"])
    identity = training_images(config).identify()
    assert (identity.classes, identity.num_images) == (Classes(7), 20)


def test_what_is_no_identity() -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        DataIdentity.from_dict({"num_classes": 2})
