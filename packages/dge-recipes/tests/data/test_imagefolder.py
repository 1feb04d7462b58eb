"""Image folders: what is missing is said, and every augmentation follows from the place in the run."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from dge_recipes.config import ImageFolderData
from dge_recipes.data import Draw
from dge_recipes.data.image_sets import check_same_classes, open_source
from dge_recipes.data.images import HeldOutImages, TrainingImages, evaluation_transform
from dge_recipes.errors import UserError


def _make(root: Path, classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 3) -> ImageFolderData:
    for part in ("train", "val"):
        for number, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                pixels = bytes((x * 7 + number * 90 + index * 20) % 256 for x in range(40 * 50 * 3))
                Image.frombytes("RGB", (50, 40), pixels).save(folder / f"{index}.png")
    return ImageFolderData(name="imagefolder", root=str(root), image_size=32, workers=0)


def open_training(config: ImageFolderData, seed: int) -> TrainingImages:
    source = open_source(config, "train")
    check_same_classes(source, open_source(config, "val"))
    return TrainingImages(source, config, seed, Path(config.root))


def open_held_out(config: ImageFolderData) -> HeldOutImages:
    return HeldOutImages(open_source(config, "val"), config, Path(config.root))


def test_an_augmentation_that_timm_does_not_know(tmp_path: Path) -> None:
    config = _make(tmp_path).model_copy(update={"auto_augment": "autumn"})
    with pytest.raises(UserError, match=r"data.auto_augment: got 'autumn', expected a policy of timm's"):
        open_training(config, seed=0)


def test_images_and_labels(tmp_path: Path) -> None:
    config = _make(tmp_path)
    train, held_out = open_training(config, seed=0), open_held_out(config)
    assert (len(train), len(held_out), held_out.source.num_classes) == (6, 6, 2)
    image, label = train[Draw(0, 0, 4)]
    assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, 1)
    assert held_out[5][0].shape == (3, 32, 32)


def test_augmentation_follows_from_seed_epoch_and_position_and_disturbs_nothing(tmp_path: Path) -> None:
    config = _make(tmp_path)
    data = open_training(config, seed=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    image = data[Draw(0, 3, 2)][0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(open_training(config, seed=1)[Draw(0, 3, 2)][0], image)
    others = [data[Draw(1, 3, 2)][0], data[Draw(0, 4, 2)][0], open_training(config, seed=2)[Draw(0, 3, 2)][0]]
    assert not any(torch.equal(other, image) for other in others)


def test_evaluation_resizes_crops_and_normalises_as_published() -> None:
    config = ImageFolderData(name="imagefolder", root=".", image_size=256, crop_pct=0.875)
    steps = evaluation_transform(config).transforms  # type: ignore[attr-defined]
    assert [type(step).__name__ for step in steps] == ["Resize", "CenterCrop", "MaybeToTensor", "Normalize"]
    assert steps[0].size == 292
    assert str(steps[0].interpolation) == "InterpolationMode.BICUBIC"
    assert steps[1].size == (256, 256)
    assert steps[3].mean == pytest.approx([0.485, 0.456, 0.406])
    assert steps[3].std == pytest.approx([0.229, 0.224, 0.225])


def test_a_missing_data_folder(tmp_path: Path) -> None:
    config = ImageFolderData(name="imagefolder", root=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere/train does not exist; expected .*train/CLASS/IMAGE"):
        open_training(config, seed=0)


def test_a_folder_without_classes(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="val holds no class folders"):
        open_held_out(ImageFolderData(name="imagefolder", root=str(tmp_path)))


def test_a_class_folder_without_images(tmp_path: Path) -> None:
    config = _make(tmp_path)
    (tmp_path / "train" / "bird").mkdir()
    (tmp_path / "train" / "bird" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"train: .*bird"):
        open_training(config, seed=0)


def test_classes_that_differ(tmp_path: Path) -> None:
    config = _make(tmp_path)
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "bird")
    with pytest.raises(UserError, match=r"differ in \['bird', 'cat'\]"):
        open_training(config, seed=0)
