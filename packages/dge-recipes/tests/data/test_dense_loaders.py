"""Loaders of dense prediction: a step sees the same images however it is split, and classes must agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from coco_folder import write_coco
from torch import Tensor

from dge_recipes.classes import Classes
from dge_recipes.config import Config
from dge_recipes.config.loading import build_config
from dge_recipes.data import (
    build_detection_data,
    build_detection_held_out,
    build_detection_training,
    build_segmentation_data,
    build_segmentation_training,
)
from dge_recipes.errors import UserError

SCENES = {"name": "scenes", "image_size": 32, "num_images": 48, "held_out_images": 10, "num_classes": 3}


def _config(folder: Path, data: dict[str, Any], task: str = "detection", workers: int = 0, **train: Any) -> Config:
    return build_config(
        {
            "task": task,
            "model": {"name": "pvt_tiny_256"},
            "head": {"kind": "retinanet" if task == "detection" else "semantic_fpn"},
            "data": {**data, "workers": workers},
            "optim": {"lr": 1e-3},
            "train": {"epochs": 2, "batch_size": 8, **train},
            "eval": {"batch_size": 4},
            "output": {"dir": str(folder)},
        }
    )


def _global_batches(config: Config, processes: int, skip: int = 0) -> list[Tensor]:
    """The images of each optimiser step, over all processes and accumulation steps, in a canonical order."""
    build = build_detection_training if config.task == "detection" else build_segmentation_training
    parts = []
    for rank in range(processes):
        loader = prepare_data_loader(build(config, processes).loader, num_processes=processes, process_index=rank)
        loader.set_epoch(1)
        batches = skip_first_batches(loader, skip) if skip else loader
        parts.append([images if isinstance(images, Tensor) else torch.stack(images) for images, _ in batches])
    forwards = [torch.cat(images) for images in zip(*parts, strict=True)]
    steps = config.train.accumulation_steps
    whole = [torch.cat(forwards[start : start + steps]) for start in range(0, len(forwards), steps)]
    return [batch[batch.flatten(1).sum(1).argsort()] for batch in whole]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_step_sees_the_same_images_however_it_is_split(tmp_path: Path, task: str) -> None:
    one = _global_batches(_config(tmp_path, SCENES, task), 1)
    assert len(one) == 6
    others = [
        _global_batches(_config(tmp_path, SCENES, task, batch_size=4), 2),
        _global_batches(_config(tmp_path, SCENES, task, batch_size=2, accumulation_steps=4), 1),
        _global_batches(_config(tmp_path, SCENES, task, workers=1), 1),
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    rest = _global_batches(_config(tmp_path, SCENES, task, batch_size=4), 2, skip=4)
    assert all(torch.equal(a, b) for a, b in zip(one[4:], rest, strict=True))


def test_detection_batches_are_lists(tmp_path: Path) -> None:
    training, held_out = build_detection_data(_config(tmp_path, SCENES), 1, masks=True)
    images, targets = next(iter(training.loader))
    assert len(images) == len(targets) == 8
    assert all(target["masks"].shape[1:] == image.shape[1:] for image, target in zip(images, targets, strict=True))
    batches = list(held_out.loader)
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert [int(target["image_id"]) for _, targets in batches for target in targets] == list(range(10))
    assert (held_out.num_images, held_out.num_classes, held_out.image_shape) == (10, 3, (3, 32, 32))
    assert held_out.identity.classes.names == ("disc", "square", "triangle")


def test_segmentation_batches(tmp_path: Path) -> None:
    training, held_out = build_segmentation_data(_config(tmp_path, SCENES, "segmentation"), 1)
    images, masks = next(iter(training.loader))
    assert (images.shape, masks.shape, masks.dtype) == ((8, 3, 32, 32), (8, 32, 32), torch.int64)
    images, targets = next(iter(held_out.loader))
    assert isinstance(images, list)
    assert targets[0]["mask"].shape == (32, 32)
    assert held_out.num_classes == 4
    assert held_out.identity.classes.names == ("background", "disc", "square", "triangle")


def test_photographs_are_dealt_in_the_same_way(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    data = {"name": "coco", "root": str(tmp_path / "coco")}
    found = []
    for workers in (0, 1):
        training, held_out = build_detection_data(_config(tmp_path, data, batch_size=5, workers=workers), 1)
        found.append([image for images, _ in training.loader for image in images])
        assert (held_out.num_images, held_out.num_classes, held_out.image_shape) == (12, 3, (3, 800, 800))
    assert len(found[0]) == 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_classes_must_be_the_same(tmp_path: Path) -> None:
    config = _config(tmp_path, SCENES)
    names = ("disc", "square", "triangle")
    assert build_detection_held_out(config, Classes(3, names)).num_classes == 3
    assert build_detection_held_out(config, Classes(3)).num_classes == 3
    with pytest.raises(UserError, match=r"the weights know disc, square; the held-out images of scenes show .*unknown"):
        build_detection_held_out(config, Classes(2, names[:2]))
    with pytest.raises(UserError, match=r"in another order: number 0 is square and disc"):
        build_detection_held_out(config, Classes(3, ("square", "disc", "triangle")))
    write_coco(tmp_path / "coco")
    path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["categories"][0]["name"] = "pear"
    path.write_text(json.dumps(content), encoding="utf-8")
    data = {"name": "coco", "root": str(tmp_path / "coco")}
    with pytest.raises(UserError, match=r"the training images show .*; the held-out ones .*unknown: pear"):
        build_detection_data(_config(tmp_path, data, batch_size=2), 1)


def test_data_of_another_task(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"serves classification; got task=detection"):
        _config(tmp_path, {"name": "shapes"})
    config = _config(tmp_path, SCENES)
    with pytest.raises(
        UserError, match=r"^data.name: got coco, which serves detection; expected data for segmentation"
    ):
        build_segmentation_training(
            config.model_copy(update={"data": _config(tmp_path, {"name": "coco", "root": "x"}).data}), 1
        )
