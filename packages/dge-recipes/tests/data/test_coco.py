"""COCO's format: what is trained on is cleaned, what is evaluated is as the file says, and mistakes are told."""

import json
import logging
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folder import CATEGORIES, write_coco
from PIL import Image
from torch import Tensor

from dge_recipes.config import CocoData
from dge_recipes.data import Draw
from dge_recipes.data.coco_images import HeldOutObjects, TrainingObjects
from dge_recipes.data.image_sets import ImageSet
from dge_recipes.errors import UserError

NAMES = ("box", "Äpfel", "猫")  # by ascending id


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no test changes."""
    root = tmp_path_factory.mktemp("coco")
    write_coco(root)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder that a test may change."""
    write_coco(tmp_path / "coco")
    return tmp_path / "coco"


def _config(root: Path, **keys: Any) -> CocoData:
    return CocoData.model_validate({"name": "coco", "root": str(root), **keys})


def _held_out(root: Path, masks: bool = False, **keys: Any) -> ImageSet:
    return _config(root, **keys).detection_images("val", None, root / "run", masks=masks)


def _training(root: Path, masks: bool = False, **keys: Any) -> ImageSet:
    return _config(root, **keys).detection_images("train", 3, root / "run", masks=masks)


def _file(root: Path, part: str = "train") -> Path:
    return root / "annotations" / f"instances_{part}2017.json"


def _change(root: Path, change: Callable[[dict[str, Any]], object], part: str = "train") -> dict[str, Any]:
    """Rewrite an annotation file."""
    content: dict[str, Any] = json.loads(_file(root, part).read_text(encoding="utf-8"))
    change(content)
    _file(root, part).write_text(json.dumps(content), encoding="utf-8")
    return content


def _by_file(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        found[names[annotation["image_id"]]].append(annotation)
    return found


def test_held_out_objects_are_as_the_file_says(written: Path) -> None:
    content = json.loads(_file(written, "val").read_text(encoding="utf-8"))
    data = _held_out(written)
    expected, labels = _by_file(content), {number: place + 1 for place, number in enumerate(sorted(CATEGORIES))}
    assert len(data.images) == 12
    assert data.identify().classes.names == NAMES
    met, ids = 0, []
    for index in range(12):
        image, target = data.images[index]
        name = str(Path(data.images.source.name(index)).relative_to(written / "val2017"))
        objects = expected.pop(name)
        boxes = [[x, y, x + width, y + height] for x, y, width, height in (each["bbox"] for each in objects)]
        assert target["boxes"].tolist() == boxes
        assert target["labels"].tolist() == [labels[each["category_id"]] for each in objects]
        assert target["iscrowd"].tolist() == [each["iscrowd"] for each in objects]
        assert torch.equal(target["area"], torch.tensor([each["area"] for each in objects]).float())
        assert (image.dtype, image.shape[0]) == (torch.float32, 3)
        assert bool(target["readable"])
        met += len(objects)
        ids.append(int(target["image_id"]))
    assert ids == list(range(12))
    assert not expected
    assert met == len(content["annotations"])
    assert sum(each["iscrowd"] for each in content["annotations"]) == 1


def test_pictures_of_every_mode_become_rgb_as_they_are_stored(written: Path) -> None:
    data = _held_out(written, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    for index in range(12):
        with Image.open(data.images.source.name(index)) as picture:  # an orientation in EXIF turns nothing
            stored = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1) / 255
        assert torch.allclose(data.images[index][0], stored)


def test_training_leaves_crowds_and_empty_images_out(written: Path) -> None:
    data = _training(written, hflip=0.0)
    content = json.loads(_file(written).read_text(encoding="utf-8"))
    assert len(data.images) == 10
    assert len(_training(written, empty="keep").images) == 12
    images = [data.images[Draw(0, 0, index)] for index in range(10)]
    count = sum(len(target["labels"]) for _, target in images)
    assert count == len(content["annotations"]) - 1
    assert all(set(target) == {"boxes", "labels", "image_id"} for _, target in images)
    kept = _training(written, empty="keep").images
    shapes = [kept[Draw(0, 0, index)][1]["boxes"].shape for index in range(12)]
    assert shapes.count((0, 4)) == 2


def test_a_flip_takes_boxes_and_masks_along(written: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    plain, flipped = _training(written, True, hflip=0.0).images, _training(written, True, hflip=1.0).images
    for index in range(10):
        (image, target), (other, turned) = plain[Draw(0, 0, index)], flipped[Draw(0, 0, index)]
        width = image.shape[-1]
        assert torch.equal(image.flip(-1), other)
        assert torch.equal(target["masks"].flip(-1), turned["masks"])
        left, top, right, bottom = target["boxes"].unbind(1)
        assert torch.equal(torch.stack([width - right, top, width - left, bottom], 1), turned["boxes"])
        assert torch.equal(target["labels"], turned["labels"])


def test_augmentation_follows_from_the_place_in_the_run(written: Path) -> None:
    def draw(images: TrainingObjects, position: int, index: int) -> Tensor:
        image: Tensor = images[Draw(1, position, index)][0]
        return image

    images = _training(written).images
    torch.manual_seed(5)
    first = [draw(images, position, 2) for position in range(20)]
    torch.manual_seed(6)
    again = [draw(images, position, 2) for position in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({image.numpy().tobytes() for image in first}) == 2


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_masks_are_those_of_pycocotools(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faster_coco_eval")
    coco = pytest.importorskip("pycocotools.coco").COCO(str(_file(written, "val")))
    capsys.readouterr()
    data = _held_out(written, True)
    for index, image_id in enumerate(sorted(coco.imgs)):
        _, target = data.images[index]
        annotations = coco.loadAnns(coco.getAnnIds([image_id]))
        assert target["masks"].shape == (len(annotations), *data.images[index][0].shape[1:])
        assert target["masks"].dtype == torch.uint8
        for mask, annotation in zip(target["masks"], annotations, strict=True):
            assert np.array_equal(mask.numpy(), coco.annToMask(annotation))
            assert mask.any()


def test_boxes_are_cut_and_those_without_area_left_out_in_training_alone(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(content: dict[str, Any]) -> None:
        first, second = (each for each in content["annotations"][:2])
        image = next(each for each in content["images"] if each["id"] == first["image_id"])
        first["bbox"] = [-5, 3, image["width"] + 50, 10.5]
        second["bbox"] = [4, 4, 0, 7]

    _change(root, change)
    _change(root, change, "val")
    with caplog.at_level(logging.WARNING):
        images = _training(root, hflip=0.0).images
    told = "1 boxes were cut at their image's edge; 1 boxes without area were left out; "
    assert told in caplog.text
    assert "images without objects were left out" in caplog.text
    every = torch.cat([images[Draw(0, 0, index)][1]["boxes"] for index in range(len(images))])
    assert bool((every[:, 2:] > every[:, :2]).all())
    assert float(every.min()) >= 0
    assert [0.0, 3.0, 13.5] in every[:, [0, 1, 3]].tolist()
    held_out = torch.cat([_held_out(root).images[index][1]["boxes"] for index in range(12)])
    assert float(held_out.min()) == -5
    assert int((held_out[:, 2] == held_out[:, 0]).sum()) == 1


def test_a_name_is_found_however_the_file_system_spells_it(root: Path) -> None:
    folder = root / "train2017" / "sub"
    (folder / "Größe 7.png").rename(folder / unicodedata.normalize("NFD", "Größe 7.png"))
    names = [_training(root).images.source.name(index) for index in range(10)]
    assert sum(Path(name).is_file() for name in names) == 10


def test_identity_knows_the_images_and_their_objects(written: Path, root: Path) -> None:
    before = _training(written).identify()
    assert before.num_images == 10
    assert before == _training(root).identify()  # wherever they lie
    assert sum(count for count, _ in before.by_class) >= 10
    assert before.occurring == [0, 1, 2]

    _change(root, lambda content: content["annotations"][0].update(bbox=[1, 1, 9, 9]))
    after = _training(root).identify()
    assert after.digest != before.digest
    changed = [a != b for a, b in zip(before.by_class, after.by_class, strict=True)]
    assert any(changed)


def test_unreadable_images_follow_the_policy(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("train", "val"):
        path = root / f"{part}2017" / "картина.png"
        path.write_bytes(path.read_bytes()[:80])
    index = next(place for place in range(12) if "картина" in _held_out(root).images.source.name(place))
    with pytest.raises(UserError, match=r"картина.png cannot be read as an image: .*data.unreadable=skip"):
        _held_out(root).images[index]
    held_out: HeldOutObjects = _held_out(root, unreadable="skip").images
    image, target = held_out[index]
    assert not image.any()
    assert not bool(target["readable"])
    assert int(target["image_id"]) == index
    assert "skipped" in caplog.text
    training: TrainingObjects = _training(root, unreadable="skip", hflip=0.0).images
    place = next(place for place in range(10) if "картина" in training.source.name(place))
    taken, following = training[Draw(0, 0, place)], training[Draw(0, 0, place + 1)]
    assert torch.equal(taken[0], following[0])
    assert torch.equal(taken[1]["boxes"], following[1]["boxes"])
    assert "картина.png" in (root / "run" / "unreadable_images.txt").read_text(encoding="utf-8")


def test_a_picture_of_another_size_than_its_annotations(root: Path) -> None:
    path = root / "val2017" / "palette.png"
    with Image.open(path) as picture:
        width, height = picture.size
        picture.transpose(Image.Transpose.ROTATE_90).save(path)
    images = _held_out(root).images
    index = next(place for place in range(12) if "palette" in images.source.name(place))
    told = rf"palette.png has {height} x {width} pixels, and its annotations are for {width} x {height}; data.exif=true"
    with pytest.raises(UserError, match=told):
        images[index]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("categories"), r"expected a mapping with the lists .*; categories is none$"),
        (lambda content: content["images"].clear(), r"names no images$"),
        (lambda content: content["annotations"].clear(), r"none of the 12 images shows an object to train on$"),
        (lambda content: content["images"][0].pop("id"), r"images\[0\] has no id$"),
        (lambda content: content["images"][1].update(id=1000), r"images\[1\]: the id 1000 is taken twice$"),
        (
            lambda content: content["images"][2].pop("width"),
            r"images\[2\] \(id 926\): got width None, expected a whole",
        ),
        (lambda content: content["images"][2].update(file_name=3), r"got file_name 3, expected a text$"),
        (lambda content: content["images"][2].update(file_name="gone.jpg"), r"train2017 lacks gone.jpg, which .*json"),
        (lambda content: content["categories"][0].update(name="box"), r"two categories are called 'box'$"),
        (lambda content: content["annotations"][1].update(image_id=3), r"annotations\[1\] \(id 11\): got image_id 3,"),
        (lambda content: content["annotations"][1].update(category_id=2), r"got category_id 2, which none of the cat"),
        (lambda content: content["annotations"][1].update(bbox=[1, 2, 3]), r"got \{'bbox': \[1, 2, 3\].*expected bbox"),
        (lambda content: content["annotations"][1].update(bbox=None), r"\(id 11\): got \{'bbox': None"),
        (lambda content: content["annotations"][1].update(area="much"), r"'area': 'much'\}, expected bbox"),
        (lambda content: content["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), r"annotations\[1\] \(id 11\)"),
        (lambda content: content["annotations"].insert(0, 4), r"annotations\[0\]: got int, expected a mapping$"),
    ],
)
def test_a_mistake_in_the_file_is_told_in_one_line(
    root: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    _change(root, change)
    with pytest.raises(UserError, match=words) as error:
        _training(root)
    assert "\n" not in str(error.value)
    assert str(root) in str(error.value)


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ({"size": [3, 4], "counts": [12]}, r"got size \[3, 4\] of run lengths, expected \["),
        ({"size": None, "counts": [3, 4]}, r"segmentations of .* cannot be read: got size None of run lengths"),
        ({"size": None, "counts": None}, r"got size None of run lengths"),
        ("text", r"got a str, expected a list of polygons or run lengths"),
        ([["a", "b"] * 3], r"got a polygon of other things than numbers"),
    ],
)
def test_a_segmentation_that_is_none(root: Path, segmentation: Any, words: str) -> None:
    pytest.importorskip("faster_coco_eval")
    content = _change(root, lambda content: content["annotations"][0].update(segmentation=segmentation))
    images = _training(root, True).images
    assert content["annotations"][0]["image_id"] == 1000
    with pytest.raises(UserError, match=words):
        images[Draw(0, 0, 9)]  # the largest id comes last


def test_masks_are_only_asked_for_where_they_are_wanted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _change(root, lambda content: content["annotations"][0].pop("segmentation"))
    assert len(_training(root).images) == 10
    pytest.importorskip("faster_coco_eval")
    with pytest.raises(UserError, match="the annotation 10 has no segmentation to take a mask from"):
        _training(root, True)


def test_missing_files(root: Path) -> None:
    with pytest.raises(UserError, match=r"gone.json do not exist; data.train_annotations and"):
        _training(root, train_annotations="gone.json")
    with pytest.raises(UserError, match=r"data folder .*gone does not exist"):
        _training(root, train_images="gone")
    _file(root).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"instances_train2017.json are no JSON: "):
        _training(root)
    with pytest.raises(UserError, match=r"has 3 categories; data.num_classes says 4"):
        _held_out(root, num_classes=4)
