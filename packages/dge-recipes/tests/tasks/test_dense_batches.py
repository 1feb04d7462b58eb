"""Evaluated in batches, images of several sizes get what they get one at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folder import write_coco
from dense_networks import scattered
from dense_recipes import dense_config
from PIL import Image
from torch import Tensor

from dge_recipes.config import Config
from dge_recipes.evaluation.detection import DetectionResults
from dge_recipes.processes import start_processes
from dge_recipes.tasks import segmentation, task_of
from dge_recipes.tasks.dense import DenseEvaluation


def _evaluated(config: Config) -> DenseEvaluation[Any]:
    """By a fresh network whose routers scatter."""
    task, accelerator = task_of(config), start_processes(config)
    held_out = task.build_held_out(config, None, "")
    torch.manual_seed(0)
    model: Any = scattered(task.build_model(config, held_out.num_classes, held_out.image_shape))
    for name, part in model.named_modules():
        if name.endswith("cls_logits"):  # as initialised, scores differ by little more than rounding
            torch.nn.init.normal_(part.weight, std=30.0)
    found: DenseEvaluation[Any] = task.evaluate(model, accelerator.prepare(held_out.loader), accelerator, held_out)  # type: ignore[assignment]
    return found


def _assert_costs(together: DenseEvaluation[Any], alone: DenseEvaluation[Any]) -> None:
    assert together.costs.as_dict() == pytest.approx(alone.costs.as_dict(), rel=1e-9)
    assert together.found.macs == pytest.approx(alone.found.macs, rel=1e-9)
    assert together.found.mac_ratio == pytest.approx(alone.found.mac_ratio, rel=1e-9)
    assert together.costs.ratio < 1


def _assert_same_detections(got: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Each has its like among the others, in whatever order: that of scores which are the same but for rounding."""
    off = (got["boxes"].unsqueeze(1) - own["boxes"]).abs()
    same = (off <= 1e-3 + 1e-5 * own["boxes"].abs()).all(-1)  # pixels
    same &= (got["scores"].unsqueeze(1) - own["scores"]).abs() <= 1e-5
    same &= got["labels"].unsqueeze(1) == own["labels"]
    # The last ones may be others: those beyond the most that an image may have, which are the same but for rounding.
    for found, scores in ((same.any(0), own["scores"]), (same.any(1), got["scores"])):
        sure = scores > scores.min() + 1e-5
        assert sure.sum() >= len(scores) - 5
        assert found[sure].all()


@pytest.mark.parametrize(
    ("kind", "model"), [("retinanet", "pyramid"), ("mask_rcnn", "pyramid"), ("faster_rcnn", "vit")]
)
def test_detections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, model: str) -> None:
    write_coco(tmp_path / "coco")
    met: dict[int, dict[str, Tensor]] = {}
    original = DetectionResults.add

    def add(self: DetectionResults, predictions: Any, targets: Any, *macs: Any) -> None:
        met.update({int(target["image_id"]): found for target, found in zip(targets, predictions, strict=True)})
        original(self, predictions, targets, *macs)

    monkeypatch.setattr(DetectionResults, "add", add)
    data = f"data={{name: coco, root: {tmp_path / 'coco'}, image_size: 64, workers: 0}}"
    settings = (data, "head.score_threshold=0", "head.long_side=96", "head.detections_per_image=20")
    results = []
    for size in (1, 5):
        config = dense_config(kind, tmp_path / "run", *settings, f"eval.batch_size={size}", model=model)
        found = _evaluated(config)
        results.append((found, dict(met)))
        met.clear()
    (alone, one), (together, five) = results
    assert len(one) == len(five) == alone.images == 12
    for place, own in one.items():
        got = five[place]
        assert len(own["boxes"]) == 20
        _assert_same_detections(got, own)
    assert together.found.as_dict() == pytest.approx(alone.found.as_dict(), rel=1e-9)
    _assert_costs(together, alone)


def _write_masks(root: Path) -> None:
    numbers = np.random.default_rng(0)
    for part in ("training", "validation"):
        for folder in ("images", "annotations"):
            (root / folder / part).mkdir(parents=True)
        for place in range(8):
            size = 64 + 10 * (place % 3), 70
            mask = numbers.integers(0, 3, size).astype(np.uint8)
            picture = np.stack([mask * 80 + numbers.integers(0, 40, size).astype(np.uint8)] * 3, 2)
            Image.fromarray(picture.astype(np.uint8)).save(root / "images" / part / f"{place}.jpg")
            Image.fromarray(mask).save(root / "annotations" / part / f"{place}.png")


@pytest.mark.parametrize(("kind", "model"), [("semantic_fpn", "pyramid"), ("upernet", "vit")])
def test_segmentations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, model: str) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    _write_masks(tmp_path / "masks")
    met: list[Tensor] = []
    original = segmentation.likeliest

    def likeliest(logits: Tensor, size: Any) -> Tensor:
        met.append(logits)
        return original(logits, size)

    monkeypatch.setattr(segmentation, "likeliest", likeliest)
    data = f"data={{name: segmentation_folder, root: {tmp_path / 'masks'}, image_size: 64, num_classes: 3, workers: 0}}"
    results = []
    for size in (1, 8):
        config = dense_config(kind, tmp_path / "run", data, f"eval.batch_size={size}", model=model)
        results.append((_evaluated(config), list(met)))
        met.clear()
    (alone, one), (together, eight) = results
    assert len(one) == len(eight) == alone.images == 8
    places = [place for start in range(3) for place in range(start, 8, 3)]  # one size after the other
    for place, got in zip(places, eight, strict=True):
        torch.testing.assert_close(got, one[place], rtol=1e-5, atol=1e-5)
    assert together.found.miou == pytest.approx(alone.found.miou, abs=1e-4)
    _assert_costs(together, alone)
