"""Corrupt and truncated images: an error by default; skipped ones are listed, replaced the same way each time in
training, and left out of evaluation, which says so."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from sample_images import write_folder

from dge_recipes.config import ImageFolderData, load_config
from dge_recipes.data import Draw
from dge_recipes.data.image_sets import open_source
from dge_recipes.data.images import UNREADABLE, HeldOutImages, TrainingImages
from dge_recipes.errors import UserError
from dge_recipes.train import train


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_folder(folder, per_class=6)
    for part in ("train", "val"):
        broken = folder / part / "cat" / "2.png"
        broken.write_bytes(broken.read_bytes()[:60])  # truncated
    (folder / "val" / "dog" / "0.png").write_bytes(b"no image")
    return folder


def _config(root: Path, unreadable: str) -> ImageFolderData:
    settings = {"name": "imagefolder", "root": str(root), "image_size": 32, "unreadable": unreadable}
    return ImageFolderData.model_validate(settings)


def test_error_names_the_file(root: Path, tmp_path: Path) -> None:
    config = _config(root, "error")
    training = TrainingImages(open_source(config, "train"), config, 0, tmp_path)
    with pytest.raises(UserError, match=r"cat/2.png cannot be read as an image: .*data.unreadable=skip"):
        training[Draw(0, 0, 2)]
    with pytest.raises(UserError, match=r"cat/2.png cannot be read as an image"):
        HeldOutImages(open_source(config, "val"), config, tmp_path)[2]


def test_training_takes_the_next_readable_image(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = _config(root, "skip")
    training = TrainingImages(open_source(config, "train"), config, 0, tmp_path)
    with caplog.at_level(logging.WARNING):
        images = [training[Draw(0, 0, number)][0] for number in (2, 3, 2)]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    assert caplog.text.count("skipped") == 1
    (line,) = (tmp_path / "unreadable_images.txt").read_text(encoding="utf-8").splitlines()
    assert line.startswith(f"{root}/train/cat/2.png cannot be read")


def test_evaluation_gets_a_mark(root: Path, tmp_path: Path) -> None:
    config = _config(root, "skip")
    images = HeldOutImages(open_source(config, "val"), config, tmp_path)
    labels = [label for _, label in (images[index] for index in range(len(images)))]
    assert labels == [0, 0, UNREADABLE, 0, 0, 0, UNREADABLE, 1, 1, 1, 1, 1]


def test_nothing_readable(root: Path, tmp_path: Path) -> None:
    for path in root.glob("train/*/*.png"):
        path.write_bytes(b"no image")
    config = _config(root, "skip")
    with pytest.raises(UserError, match="none of the 12 training images can be read"):
        TrainingImages(open_source(config, "train"), config, 0, tmp_path)[Draw(0, 0, 0)]


def _overrides(root: Path, tmp_path: Path) -> Sequence[str]:
    model = ("model.kwargs.img_size=32", "model.kwargs.depth=1", "data.image_size=32", "data.num_classes=2")
    short = ("train.epochs=2", "train.batch_size=4", "schedule.warmup_epochs=0", "optim.lr_batch=null")
    places = (f"data.root={root}", f"output.dir={tmp_path / 'run'}", "eval.timing_rounds=0", "eval.batch_size=5")
    return (*model, *short, *places, "data.workers=2")


def test_a_run_from_worker_processes(root: Path, tmp_path: Path) -> None:
    name = "deit_tiny_256"
    with pytest.raises(UserError, match=r"^\S+\.png cannot be read as an image: [^\n]*data.unreadable=skip to go on"):
        train(load_config(name, _overrides(root, tmp_path)))
    summary = train(load_config(name, [*_overrides(root, tmp_path), "data.unreadable=skip"]), overwrite=True)
    assert (summary["images"], summary["unreadable"]) == (10, 2)
    assert summary["unreadable_images"] == 3
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["unreadable"] for record in records if record["kind"] == "eval"] == [2, 2]
