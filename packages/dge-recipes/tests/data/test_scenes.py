"""Scenes: always the same held-out ones, never twice in training; boxes and masks are of what is seen."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dge_recipes.config import Config, ScenesData, load_config
from dge_recipes.data import Draw
from dge_recipes.data.scenes import BACKGROUND, KINDS, VISIBLE, Scene, draw_scene
from dge_recipes.data.shapes import numbers_of
from dge_recipes.errors import UserError

SMALL = ScenesData(name="scenes", image_size=64, num_images=40, held_out_images=20)
CROWDED = SMALL.model_copy(update={"max_objects": 12, "largest": 0.6})


@pytest.fixture
def scenes_config(tmp_path: Path) -> Callable[..., Config]:
    """A config whose data are scenes."""
    small = ("data={name: scenes, image_size: 64, num_images: 40, held_out_images: 20}", f"output.dir={tmp_path}")
    return lambda *overrides: load_config("shapes_dense", [*small, *overrides])


def _scenes(config: ScenesData, count: int = 40) -> list[Scene]:
    return [draw_scene(numbers_of(0, 1, number), config) for number in range(count)]


def test_a_scene_follows_from_seed_part_and_number(tmp_path: Path) -> None:
    held_out = SMALL.detection_images("val", None, tmp_path).images
    image, target = held_out[7]
    torch.manual_seed(0)
    again = SMALL.detection_images("val", None, tmp_path, masks=True).images[7]
    assert (image.shape, image.dtype, len(held_out)) == ((3, 64, 64), torch.float32, 20)
    assert torch.equal(image, again[0])
    assert torch.equal(target["boxes"], again[1]["boxes"])
    assert not torch.equal(image, held_out[8][0])
    other = SMALL.model_copy(update={"seed": 1}).detection_images("val", None, tmp_path).images
    assert not torch.equal(image, other[7][0])
    assert not torch.equal(image, SMALL.detection_images("train", None, tmp_path).images[7][0])
    with pytest.raises(IndexError, match="got 20, expected 0 to 19"):
        held_out[20]


def test_every_epoch_draws_new_scenes_whatever_their_order(tmp_path: Path) -> None:
    training = SMALL.segmentation_images("train", 0, tmp_path).images
    image, mask = training[Draw(epoch=1, position=5, image=9)]
    again = training[Draw(1, 30, 9)]
    assert torch.equal(image, again[0])
    assert torch.equal(mask, again[1])
    seen = {training[Draw(epoch, 0, number)][0].numpy().tobytes() for epoch in range(3) for number in range(40)}
    held_out = SMALL.segmentation_images("val", None, tmp_path).images
    seen |= {held_out[number][0].numpy().tobytes() for number in range(20)}
    assert len(seen) == 140


def test_masks_and_boxes_are_of_what_is_seen() -> None:
    hidden = 0
    for scene in _scenes(CROWDED):
        assert 1 <= len(scene.labels) == len(scene.masks) == len(scene.boxes) <= 12
        assert int(scene.masks.sum(0).max()) == 1  # no pixel is in two masks
        for mask, (left, top, right, bottom) in zip(scene.masks, scene.boxes.int().tolist(), strict=True):
            rows, columns = np.nonzero(mask.numpy())
            assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            hidden += bool(mask.float().mean() < 0.02)
    assert hidden  # shapes do hide parts of each other


def test_a_shape_of_which_too_little_would_be_seen_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = sum(len(scene.labels) for scene in _scenes(CROWDED))
    monkeypatch.setattr("dge_recipes.data.scenes.VISIBLE", 0.0)
    every = sum(len(scene.labels) for scene in _scenes(CROWDED))
    assert VISIBLE > 0
    assert 0.5 * every < counted < every


def test_a_picture_shows_its_masks() -> None:
    """Within a mask of a shape the pixels differ from the ground, and outside of all masks they do not."""
    for scene in _scenes(SMALL):
        taken = scene.masks.any(0)
        ground = scene.image[:, ~taken].median(1).values.view(3, 1, 1)
        differs = (scene.image - ground).abs().amax(0) > 0.3
        agrees = differs == taken
        assert float(agrees.float().mean()) > 0.97  # but for soft edges
        assert -1 < float(scene.image.min()) < float(scene.image.max()) < 1


def test_scenes_are_mostly_empty_and_hold_every_kind_in_every_size() -> None:
    scenes = _scenes(SMALL.model_copy(update={"num_classes": 6}), 200)
    assert sum(float(scene.masks.any(0).float().mean()) for scene in scenes) / 200 < 0.2
    labels = np.bincount([label for scene in scenes for label in scene.labels], minlength=6)
    assert labels.min() > 60
    assert {len(scene.labels) for scene in scenes} == {1, 2, 3, 4, 5}
    widths = torch.cat([scene.boxes[:, 2] - scene.boxes[:, 0] for scene in scenes])
    assert float(widths.max()) <= 64 * SMALL.largest + 2
    assert float(widths.quantile(0.1)) < 12 < 18 < float(widths.quantile(0.9))


def test_targets(tmp_path: Path) -> None:
    _, target = SMALL.detection_images("train", 0, tmp_path, masks=True).images[Draw(0, 0, 3)]
    count = len(target["labels"])
    assert set(target) == {"boxes", "labels", "masks", "image_id"}
    assert (target["masks"].shape, target["masks"].dtype) == ((count, 64, 64), torch.uint8)
    assert (target["labels"].dtype, target["boxes"].dtype, int(target["image_id"])) == (torch.int64, torch.float32, 3)
    assert int(target["labels"].min()) >= 1
    data = SMALL.detection_images("val", None, tmp_path)
    _, target = data.images[3]
    assert set(target) == {"boxes", "labels", "image_id", "area", "iscrowd", "readable"}
    assert data.identify().classes.names == KINDS[:5]
    assert bool(target["readable"])
    assert not target["iscrowd"].any()


def test_both_tasks_see_the_same_scenes(tmp_path: Path) -> None:
    data = SMALL.segmentation_images("val", None, tmp_path)
    assert data.identify().classes.names == (BACKGROUND, *KINDS[:5])
    for number in range(20):
        image, target = SMALL.detection_images("val", None, tmp_path, masks=True).images[number]
        same, segmented = data.images[number]
        assert torch.equal(image, same)
        expected = torch.zeros(64, 64, dtype=torch.int64)
        for mask, label in zip(target["masks"], target["labels"], strict=True):
            expected[mask == 1] = label
        assert torch.equal(segmented["mask"], expected)
        assert torch.equal(target["area"], target["masks"].sum((1, 2)).float())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.num_classes=11", r"'data\.num_classes': got 11"),
        ("data.image_size=16", r"'data\.image_size': got 16"),
        ("data.max_objects=0", r"'data\.max_objects': got 0"),
        ("data.smallest=0.5", r"^data\.smallest: got 0\.5, expected data\.largest \(0\.4\) or less$"),
    ],
)
def test_keys_are_checked(scenes_config: Callable[..., Config], override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        scenes_config(override)
