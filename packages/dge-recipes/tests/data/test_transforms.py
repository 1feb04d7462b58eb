"""Every operation that timm's policies can draw works on every picture with the Pillow and the timm that are installed,
and what fails all the same is told in one line with the image, the operation and its level."""

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sample_images import write_folder
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader
from torchvision.transforms import Compose

from dge_recipes.config import ImageFolderData
from dge_recipes.data import Draw
from dge_recipes.data.decoding import TransformError
from dge_recipes.data.image_sets import open_source
from dge_recipes.data.images import HeldOutImages, TrainingImages
from dge_recipes.data.transforms import Transform, training_transform
from dge_recipes.errors import UserError
from dge_recipes.randomness import isolated_seed

POLICIES = (
    *("rand", "rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "rand-m10-inc1-n4-p1", "rand-m0-n4-p1", "rand-mstd101-inc1"),
    *("rand-m20-mmax30-inc1-p1", "rand-m20-mmax30-p1", "rand-m9-mstd5-tweights-n6", "rand-t3a-p1", "rand-t3aw-inc1-p1"),
    *("augmix-m3-w3", "augmix-m10-mstd0.5", "augmix-m10-mstd5-b1-d5"),
    *("original", "originalr-mstd3", "v0", "v0-mstd9", "v0r-mstd9", "3a", "3a-mstd5"),
)
SIZES = ((40, 30), (1, 1), (2, 1), (5000, 1), (1, 700))


def _config(policy: str | None, **keys: object) -> ImageFolderData:
    settings = {"name": "imagefolder", "root": ".", "image_size": 32, "auto_augment": policy, **keys}
    return ImageFolderData.model_validate(settings)


def _picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _operations(transform: Transform) -> Iterator[Any]:
    for step in transform.transforms:
        yield from getattr(step, "ops", [])
        for part in getattr(step, "policy", []):
            yield from part


def _check_ends(operation: Any) -> None:
    """At both ends of its range, as timm's own code does it, or black where Pillow refuses that."""
    plain = auto_augment.AugmentOp(operation.name, hparams=operation.hparams)
    for level in (0.0, float(operation.magnitude_max or 10)):
        for each in (plain, operation):
            each.prob, each.magnitude, each.magnitude_std = 1.0, level, 0
        for picture in [_picture(*size) for size in SIZES]:
            for seed in (0, 1):  # which may turn the level's sign
                random.seed(seed)
                found = operation(picture)
                random.seed(seed)
                assert (found.mode, found.size) == ("RGB", picture.size)
                try:
                    expected = plain(picture)
                except ValueError:
                    assert operation.name.startswith("Posterize")
                    expected = Image.new("RGB", picture.size)
                assert found.tobytes() == expected.tobytes(), (operation.name, level, picture.size)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_operation_of_a_policy_at_both_ends(policy: str) -> None:
    with isolated_seed(0):
        operations = {operation.name: operation for operation in _operations(training_transform(_config(policy)))}
        assert len(operations) >= 3
        for operation in operations.values():
            _check_ends(operation)


@pytest.mark.parametrize("name", auto_augment.NAME_TO_OP)
@pytest.mark.parametrize("most", [None, 30])
def test_every_operation_that_timm_has(name: str, most: int | None) -> None:
    settings = {"translate_const": 14, "img_mean": (1, 2, 3), "magnitude_max": most}
    operation = auto_augment.AugmentOp(name, hparams=settings)
    Transform(Compose([auto_augment.RandAugment([operation])]))
    with isolated_seed(0):
        _check_ends(operation)


@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing"])
def test_no_bits_are_black(name: str) -> None:
    operation = auto_augment.AugmentOp(name, 1.0, 0 if name == "Posterize" else 10)
    Transform(Compose([auto_augment.AutoAugment([[operation]])]))
    assert operation(_picture(3, 2)).tobytes() == bytes(18)


@pytest.mark.parametrize("policy", [*POLICIES, None])
@pytest.mark.parametrize("image_size", [1, 32])
def test_whatever_is_drawn(policy: str | None, image_size: int) -> None:
    transform = training_transform(_config(policy, image_size=image_size, random_erasing=1.0))
    for seed in range(30):
        with isolated_seed(seed):
            image = transform(_picture(*SIZES[seed % len(SIZES)]))
        assert image.shape == (3, image_size, image_size)
        assert image.isfinite().all()


def test_nothing_else_is_changed() -> None:
    config = _config("rand-m9-mstd0.5-inc1", random_erasing=0.0)
    known = dict(auto_augment.NAME_TO_OP)
    ours = training_transform(config)
    assert known == auto_augment.NAME_TO_OP
    timms = create_transform(32, is_training=True, auto_augment=config.auto_augment, interpolation="bicubic")
    assert next(iter(timms.transforms[2].ops)).aug_fn in known.values()
    equal = 0
    for seed in range(200):
        with isolated_seed(seed):
            image = ours(_picture(40, 30))
        try:
            with isolated_seed(seed):
                equal += torch.equal(image, timms(_picture(40, 30)))
        except ValueError as error:  # Pillow 13 and no bits
            assert "bits" in str(error)
            equal += 1
    assert equal == 200


def test_a_transform_can_be_sent_to_another_process() -> None:
    transform = training_transform(_config("rand-m10-mstd0.5-inc1"))
    copy = pickle.loads(pickle.dumps(transform))
    for seed in range(5):
        images = []
        for each in (transform, copy):
            with isolated_seed(seed):
                images.append(each(_picture(40, 30)))
        assert torch.equal(*images)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("rand-n16-tweights", r"fails on a plain picture: RandAugment: Cannot take a larger sample"),
        ("augmix-a0", r"fails on a plain picture: AugMixAugment: "),
        ("rand-n1.5", r"expected a policy of timm's"),
    ],
)
def test_a_policy_that_cannot_be_applied(policy: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"^data.auto_augment: .*{policy}.*{words}"):
        training_transform(_config(policy))


def _images(root: Path, policy: str | None) -> TrainingImages:
    write_folder(root)
    config = _config(policy, root=str(root))
    return TrainingImages(open_source(config, "train"), config, 0, root)


def _refuse(*arguments: object, **options: object) -> None:
    raise ValueError("refused\nhere")


def test_an_operation_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = _images(tmp_path, "v0-mstd0.5")
    steps = images.transform.transforms
    (policy,) = (step for step in steps if hasattr(step, "policy"))
    policy.policy = [part[:1] for part in policy.policy if part[0].name in {"Solarize", "Equalize"}]
    for part in policy.policy:
        part[0].prob = 1.0
    monkeypatch.setattr(ImageOps, "solarize", _refuse)
    monkeypatch.setattr(ImageOps, "equalize", _refuse)
    draws = [Draw(0, position, 4) for position in range(20)]
    told = set()
    for draw in draws:
        with pytest.raises(UserError) as error:
            images[draw]
        told.add(str(error.value))
    start = f"{tmp_path}/train/dog/1.png cannot be transformed: "
    assert f"{start}Equalize: refused here" in told
    levels = [text for text in told if text.startswith(f"{start}Solarize at level ")]
    assert len(levels) + 1 == len(told) > 3
    assert all(text.endswith("): refused here") for text in levels)
    loader = DataLoader(images, batch_size=None, sampler=draws, num_workers=1)
    with pytest.raises(UserError, match=r"^\S+/train/dog/1.png cannot be transformed: [^\n]*: refused here$"):
        list(loader)


def test_a_step_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    config = _config(None, root=str(tmp_path))
    images = HeldOutImages(open_source(config, "val"), config, tmp_path)
    monkeypatch.setattr(Image.Image, "crop", _refuse)
    with pytest.raises(UserError, match=r"val/cat/2.png cannot be transformed: CenterCrop: refused here$"):
        images[2]


def test_faults_of_others_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise MemoryError

    images = _images(tmp_path, "rand-m10-p1")
    (policy,) = (step for step in images.transform.transforms if hasattr(step, "ops"))
    policy.ops = [operation for operation in policy.ops if operation.name == "Invert"]
    monkeypatch.setattr(ImageOps, "invert", no_memory)
    with pytest.raises(UserError, match=r"train/cat/1.png cannot be read: out of memory$"):
        images[Draw(0, 0, 1)]
    monkeypatch.setattr(ImageOps, "invert", _refuse)
    with pytest.raises(TransformError, match=r"^Invert: refused here$"):
        images.transform(_picture(9, 9))
    monkeypatch.undo()
    monkeypatch.setattr(images.source, "label", lambda index: {}[index])  # a fault of the program
    with pytest.raises(KeyError):
        images[Draw(0, 0, 1)]
