"""What unreadable=skip may skip: pictures that are none, not what the machine failed to read, and only so many."""

import errno
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from sample_images import write_folder
from torch import Tensor
from torch.utils.data import DataLoader

from dge_recipes.config import ImageData, ImageFolderData
from dge_recipes.data import Draw
from dge_recipes.data.image_sets import open_source
from dge_recipes.data.images import UNREADABLE, HeldOutImages, SkippedImages, TrainingImages
from dge_recipes.errors import UserError
from dge_recipes.evaluation import evaluate

_PER_CLASS, _SIZE = 15, 32


def _config(root: Path, **keys: object) -> ImageFolderData:
    settings = {"name": "imagefolder", "root": str(root), "image_size": _SIZE, "unreadable": "skip", **keys}
    return ImageFolderData.model_validate(settings)


def _held_out(config: ImageData, folder: Path) -> HeldOutImages:
    return HeldOutImages(open_source(config, "val"), config, folder)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """30 training and 30 held-out images."""
    write_folder(tmp_path / "data", per_class=_PER_CLASS)
    return tmp_path / "data"


def _spoil(root: Path, part: str, count: int) -> None:
    """The first images are none any more; half of them in each class."""
    for number in range(count):
        (root / part / ("cat", "dog")[number % 2] / f"{number // 2}.png").write_bytes(b"no image")


@contextmanager
def _no_more_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("unreadable", ["skip", "error"])
def test_a_file_that_is_gone(root: Path, unreadable: str) -> None:
    config = _config(root, unreadable=unreadable)
    images = _held_out(config, root)
    path = root / "val" / "cat" / "1.png"
    path.unlink()
    with pytest.raises(UserError, match=rf"^{path} cannot be read: \[Errno 2\] No such file"):
        images[1]
    path.mkdir()
    with pytest.raises(UserError, match=rf"^{path} cannot be read: \[Errno 21\] Is a directory"):
        images[1]
    training = TrainingImages(open_source(config, "train"), config, 0, root)
    shutil.rmtree(root / "train")  # a mount that is lost
    with pytest.raises(UserError, match=rf"^{root}/train/cat/0.png cannot be read: \[Errno 2\] No such file"):
        training[Draw(0, 0, 0)]
    assert not list(root.glob("unreadable_images.txt"))


def test_no_descriptor_left(root: Path) -> None:
    images = _held_out(_config(root), root)
    with (
        _no_more_descriptors(),
        pytest.raises(UserError, match=r"1.png cannot be read: \[Errno 24\] Too many open files"),
    ):
        images[1]
    assert images[1][1] == 0


@pytest.mark.parametrize("number", ["EIO", "ESTALE", "ENFILE", "ENOMEM", "EACCES", "ENOTCONN", "ENOSPC", "EINTR"])
def test_other_errors_of_the_system(root: Path, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = _held_out(_config(root), root)
    words = os.strerror(getattr(errno, number))

    def fail(index: int) -> None:
        raise OSError(getattr(errno, number), words, images.source.name(index))

    monkeypatch.setattr(images.source, "read", fail)
    with pytest.raises(UserError, match=rf"^{root}/val/cat/1.png cannot be read: \[Errno \d+\] {words}"):
        images[1]


def test_memory_that_is_short(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> None:
        raise MemoryError

    images = _held_out(_config(root), root)
    monkeypatch.setattr(images.source, "read", fail)
    with pytest.raises(UserError, match=r"cat/1.png cannot be read: out of memory$"):
        images[1]


def test_an_error_of_the_machine_in_a_worker(root: Path) -> None:
    images = _held_out(_config(root), root)
    (root / "val" / "dog" / "2.png").unlink()
    with pytest.raises(UserError, match=r"^\S+/val/dog/2.png cannot be read: \[Errno 2\] No such file[^\n]*$"):
        list(DataLoader(images, 4, num_workers=2))


def test_other_users_errors_are_not_skipped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> None:
        raise UserError("the tar has changed")

    images = _held_out(_config(root), root)
    monkeypatch.setattr(images.source, "read", fail)
    with pytest.raises(UserError, match=r"^the tar has changed$"):
        images[1]


def _train(root: Path, **keys: object) -> Callable[[int], object]:
    config = _config(root, **keys)
    images = TrainingImages(open_source(config, "train"), config, 0, root)
    return lambda image: images[Draw(0, image, image)]


def _evaluate(root: Path, **keys: object) -> Callable[[int], object]:
    return _held_out(_config(root, **keys), root).__getitem__


@pytest.mark.parametrize(("part", "reader"), [("train", _train), ("val", _evaluate)])
def test_how_many_may_be_skipped(root: Path, part: str, reader: Callable[..., Any], caplog: Any) -> None:
    _spoil(root, part, 10)
    for _ in range(2):  # each image counts once
        for read in [reader(root)]:
            for index in [*range(30), *range(30)]:
                read(index)
    _spoil(root, part, 11)
    read = reader(root)
    words = (
        r"^11 of 30 images cannot be read, and data.max_unreadable=0.1 allows 10; mend those that "
        rf"{root}/unreadable_images.txt lists, or raise data.max_unreadable$"
    )
    with pytest.raises(UserError, match=words):
        for index in range(30):
            read(index)
    for share, most in ((0.4, 12), (0.5, 15)):
        _spoil(root, part, most)
        read = reader(root, max_unreadable=share)
        for index in range(30):
            read(index)
        _spoil(root, part, most + 1)
        with pytest.raises(UserError, match=f"^{most + 1} of 30 images .*max_unreadable={share} allows {most};"):
            for index in range(30):
                read(index)


def test_shares_are_counted_exactly(tmp_path: Path) -> None:
    for share, images, most in ((0.29, 100, 29), (0.07, 1000, 70), (0, 100, 10), (1, 30, 30), (0.1, 99, 10)):
        skipped = SkippedImages(images, share, tmp_path)
        skipped.check(most)
        with pytest.raises(UserError, match=f"allows {most};"):
            skipped.check(most + 1)


def test_training_ends_soon_where_all_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, per_class=60)
    for path in tmp_path.glob("train/*/*.png"):
        path.write_bytes(b"")
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match=r"^21 of 120 images cannot be read"):
        _train(tmp_path)(0)
    assert caplog.text.count("the file is empty") == 21


def test_the_workers_of_a_process_count_together(root: Path) -> None:
    Image.init()  # once, not in each of the workers, which take seconds for it where bytecode is not kept
    _spoil(root, "val", 12)  # six for each worker, a class each
    images = _held_out(_config(root), root)
    loader = DataLoader(images, _PER_CLASS, num_workers=2, persistent_workers=True)
    with pytest.raises(UserError, match=r"^1[12] of 30 images cannot be read, [^\n]*$"):
        list(loader)
    images = _held_out(_config(root, max_unreadable=0.4), root)
    loader = DataLoader(images, _PER_CLASS, num_workers=2, persistent_workers=True)
    (root / "unreadable_images.txt").unlink()
    for _ in range(2):
        labels = torch.cat([labels for _, labels in loader])
        assert int((labels == UNREADABLE).sum()) == 12
    lines = (root / "unreadable_images.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 12
    images.check_skipped(12)
    with pytest.raises(UserError, match=r"^13 of 30"):
        images.check_skipped(13)


class _Met:
    """Batches of a data set as several processes meet them."""

    def __init__(self, dataset: HeldOutImages, unreadable: int) -> None:
        self.dataset = dataset
        self._labels = torch.tensor([UNREADABLE] * unreadable + [0] * (30 - unreadable))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.zeros(30, 3, _SIZE, _SIZE), self._labels


def test_evaluation_counts_what_all_processes_met(root: Path) -> None:
    small = {"img_size": _SIZE, "embed_dim": 16, "num_heads": 2, "depth": 1}
    model = timm.create_model("deit_tiny_patch16_224", num_classes=2, **small)
    images, accelerator = _held_out(_config(root), root), Accelerator(cpu=True)
    assert evaluate(model, _Met(images, 10), accelerator, 30).unreadable == 10
    with pytest.raises(UserError, match=r"^11 of 30 images cannot be read"):
        evaluate(model, _Met(images, 11), accelerator, 30)
