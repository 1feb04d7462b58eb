"""Folders of index masks: ADE20K's and Cityscapes' layouts, what the values mean, crops, and mistakes that are told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dge_recipes.config import SegmentationFolderData
from dge_recipes.data import Draw
from dge_recipes.data.dense_targets import IGNORED
from dge_recipes.data.image_sets import ImageSet
from dge_recipes.errors import UserError

SIZES = [(40, 30), (30, 40), (90, 20), (64, 64), (33, 47), (50, 50)]


def _write(root: Path, images: str, masks: str, image_end: str = ".jpg", mask_end: str = ".png") -> None:
    """Images whose masks are 3 at the left, 1 in the middle and 255 at the right."""
    for place, (width, height) in enumerate(SIZES):
        values = np.full((height, width), 255, np.uint8)
        values[:, : width // 3], values[:, width // 3 : 2 * width // 3] = 3, 1
        picture = np.full((height, width, 3), 10 * place, np.uint8)
        picture[:, : width // 3] = 200
        for folder, name, content in ((images, image_end, picture), (masks, mask_end, values)):
            path = root / folder / f"{'sub/' if place % 2 else ''}{place} é{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """ADE20K's layout."""
    for part in ("training", "validation"):
        _write(tmp_path, f"images/{part}", f"annotations/{part}")
    return tmp_path


def _open(root: Path, part: str = "val", seed: int | None = None, **keys: Any) -> ImageSet:
    settings = {"name": "segmentation_folder", "root": str(root), "num_classes": 4, "image_size": 32, **keys}
    config = SegmentationFolderData.model_validate(settings)
    return config.segmentation_images("train" if part == "train" else "val", seed, root / "run")


def test_held_out_masks_keep_their_size(root: Path) -> None:
    data = _open(root, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert (len(data.images), data.channels) == (6, 3)
    sizes = set()
    for index in range(6):
        image, target = data.images[index]
        height, width = target["mask"].shape
        sizes.add((width, height))
        short = min(image.shape[1:])
        assert short == 32 or max(image.shape[1:]) == 4 * 32 > width * 32 / height * 0.8
        assert abs(image.shape[2] / image.shape[1] - width / height) < 0.1
        assert target["mask"].dtype == torch.int64
        assert target["mask"].unique().tolist() == [1, 3, IGNORED]
        assert int(target["image_id"]) == index
        assert abs(float(image[:, :, 0].mean()) - 200 / 255) < 0.1
    assert sizes == set(SIZES)


def test_cityscapes_layout(tmp_path: Path) -> None:
    for part in ("train", "val"):
        _write(tmp_path, f"leftImg8bit/{part}", f"gtFine/{part}", "_leftImg8bit.png", "_gtFine_labelTrainIds.png")
        (tmp_path / "gtFine" / part / "0 é_gtFine_color.png").write_bytes(b"another picture of the same")
    keys = {
        **{f"{part}_images": f"leftImg8bit/{part}" for part in ("train", "val")},
        **{f"{part}_masks": f"gtFine/{part}" for part in ("train", "val")},
        **{"image_suffix": "_leftImg8bit.png", "mask_suffix": "_gtFine_labelTrainIds.png"},
    }
    data = _open(tmp_path, **keys)
    assert len(data.images) == 6
    assert data.images[5][1]["mask"].unique().tolist() == [1, 3, IGNORED]


def test_masks_that_count_from_one(root: Path) -> None:
    path = root / "annotations" / "validation" / "0 é.png"
    values = np.array(Image.open(path))
    values[0, :5] = 0
    Image.fromarray(values).save(path)
    target = _open(root, reduce_zero_label=True, num_classes=3).images[0][1]
    mask = target["mask"]
    assert mask.unique().tolist() == [0, 2, IGNORED]
    assert mask[0, :6].tolist() == [IGNORED] * 5 + [2]
    assert torch.equal(mask == 0, torch.from_numpy(values == 1))


def test_palettes_and_sixteen_bits_are_numbers_too(root: Path) -> None:
    folder = root / "annotations" / "validation"
    names = sorted(folder.glob("*.png"))
    with Image.open(names[0]) as mask:
        palette = Image.fromarray(np.asarray(mask))
        palette.putpalette(bytes(255 - number for number in range(256) for _ in range(3)))
        wide = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257)
    expected = _open(root).images[0][1]["mask"]
    assert palette.mode == "P"
    palette.save(names[0])
    assert torch.equal(_open(root).images[0][1]["mask"], expected)
    wide.save(names[0])
    mask = _open(root, ignore_index=65535).images
    with pytest.raises(UserError, match=r"got the value 771, expected 0 to 3, or 65535 to ignore"):
        mask[0]


def test_training_crops_are_of_one_size(root: Path) -> None:
    data = _open(root, "train", 0, photometric=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    padded = 0
    for position in range(30):
        image, mask = data.images[Draw(0, position, position % 6)]
        assert (image.shape, image.dtype) == ((3, 32, 32), torch.float32)
        assert (mask.shape, mask.dtype) == ((32, 32), torch.int64)
        assert set(mask.unique().tolist()) <= {1, 3, IGNORED}
        padded += bool((image[:, -1] == 0).all())
        # The left third of an image is bright and of class 3: both went the same way.
        bright = (image[0] > 0.6) == (mask == 3)
        assert float(bright.float().mean()) > 0.85
    assert padded


def test_augmentation_follows_from_the_place_in_the_run(root: Path) -> None:
    images = _open(root, "train", 0).images
    torch.manual_seed(1)
    first = [images[Draw(2, position, 3)] for position in range(8)]
    torch.manual_seed(2)
    again = [images[Draw(2, position, 3)] for position in reversed(range(8))][::-1]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert len({image.numpy().tobytes() for image, _ in first}) == 8
    other = _open(root, "train", 1).images[Draw(2, 0, 3)]
    assert not torch.equal(other[0], first[0][0])


def test_crops_of_a_single_class_are_drawn_anew(root: Path) -> None:
    keys: dict[str, Any] = {"size_range": (4.0, 4.0), "photometric": False}
    shares = []
    for share in (0.6, 1.0):
        images = _open(root, "train", 0, max_class_share=share, **keys).images
        masks = [images[Draw(0, position, 3)][1] for position in range(60)]
        counts = [torch.bincount(mask[mask != IGNORED]) for mask in masks if (mask != IGNORED).any()]
        shares.append(sum(float(each.max() / each.sum()) for each in counts) / len(counts))
    assert shares[0] < shares[1] - 0.1


def test_names_of_classes(root: Path) -> None:
    (root / "classes.txt").write_text("wall\nsky\n\npoteau élevé\nWand\n", encoding="utf-8")
    identity = _open(root, class_names="classes.txt", num_classes=None).identify()
    assert identity.classes.names == ("wall", "sky", "poteau élevé", "Wand")
    assert identity.num_images == 6
    assert _open(root).identify().classes.names is None
    assert _open(root).identify().digest == identity.digest
    (root / "images/validation/0 é.jpg").unlink()
    assert _open(root).identify().digest != identity.digest
    with pytest.raises(UserError, match=r"classes.txt has 4 names; data.num_classes says 3"):
        _open(root, class_names="classes.txt", num_classes=3)
    (root / "classes.txt").write_text("wall\nwall\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"has the name 'wall' twice"):
        _open(root, class_names="classes.txt", num_classes=None)
    with pytest.raises(UserError, match=r"data.class_names: .*gone.txt cannot be read"):
        _open(root, class_names="gone.txt")


def test_unreadable_images_and_masks_follow_the_policy(root: Path) -> None:
    broken = root / "annotations" / "validation" / "0 é.png"
    broken.write_bytes(broken.read_bytes()[:40])
    (root / "images" / "training" / "0 é.jpg").write_bytes(b"none")
    with pytest.raises(UserError, match=r"0 é.jpg cannot be read as an image: its mask .*0 é.png: "):
        _open(root).images[0]
    image, target = _open(root, unreadable="skip").images[0]
    assert not image.any()
    assert not bool(target["readable"])
    assert (target["mask"] == IGNORED).all()
    training = _open(root, "train", 0, unreadable="skip").images
    assert torch.equal(training[Draw(0, 0, 0)][0], training[Draw(0, 0, 1)][0])


def test_mistakes_name_the_file(root: Path) -> None:
    mask = root / "annotations" / "validation" / "0 é.png"
    values = np.array(Image.open(mask))
    values[3, 4] = 7
    Image.fromarray(values).save(mask)
    with pytest.raises(UserError, match=r"^mask .*0 é.png: got the value 7, expected 0 to 3, or 255 to ignore$"):
        _open(root).images[0]
    with pytest.raises(UserError, match=r"^mask .*0 é.png: got the value 255, expected 0 to 3$"):
        _open(root, ignore_index=None).images[0]
    Image.fromarray(values[:, :-1]).save(mask)
    with pytest.raises(UserError, match=r"^mask .*0 é.png has 39 x 30 pixels, its image 40 x 30$"):
        _open(root).images[0]
    Image.fromarray(values).convert("RGB").save(mask)
    with pytest.raises(UserError, match=r"^mask .*: got a picture of mode RGB, expected one number per pixel$"):
        _open(root).images[0]
    mask.unlink()
    with pytest.raises(UserError, match=r"annotations/validation lacks 0 é.png of 6 masks; data.mask_suffix is .png$"):
        _open(root)
    with pytest.raises(UserError, match=r"data folder .*gone does not exist; data.val_masks says where"):
        _open(root, val_masks="gone")
    with pytest.raises(UserError, match=r"images/validation holds no images that end in _x.png$"):
        _open(root, image_suffix="_x.png")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_classes": None}, "got null; expected a number, or the file of the names in data.class_names"),
        ({"size_range": (2.0, 1.0)}, r"data.size_range: got \[2.0, 1.0\], expected the smaller size first"),
        ({"num_classes": 256}, "less than or equal to 255"),
    ],
)
def test_keys_are_checked(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _open(tmp_path, **keys)
