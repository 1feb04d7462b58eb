"""Runs on files: a folder of COCO's format scores what pycocotools finds by hand, and index masks are learnt from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_by_hand import scores_by_hand
from coco_folder import write_coco
from dense_recipes import dense_config
from PIL import Image

from dge_recipes.data import build_detection_held_out
from dge_recipes.evaluate import main
from dge_recipes.models import load_weights
from dge_recipes.tasks import task_of
from dge_recipes.train import train

SCORES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def _evaluated(run: Path) -> dict[str, Any]:
    report = run.parent / "report.json"
    assert main([str(run), "--json", str(report)]) == 0
    content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet"])
def test_scores_of_a_run_are_those_of_pycocotools(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("faster_coco_eval")
    pytest.importorskip("torchmetrics")
    root = tmp_path / "coco"
    write_coco(root)
    broken = root / "val2017" / "картина.png"
    broken.write_bytes(broken.read_bytes()[:90])
    data = f"data={{name: coco, root: {root}, image_size: 64, unreadable: skip, workers: 0}}"
    config = dense_config(
        kind, tmp_path / "run", data, "head.score_threshold=0", "train.epochs=4", "train.batch_size=5"
    )
    summary = train(config)
    assert (summary["images"], summary["unreadable"], summary["steps"]) == (11, 1, 8)
    assert summary["data"]["classes"] == ["box", "Äpfel", "猫"]
    report = _evaluated(tmp_path / "run")
    assert (report["images"], report["unreadable"]) == (11, 1)

    held_out = build_detection_held_out(config)
    model = task_of(config).build_model(config, held_out.num_classes, held_out.image_shape, init=False).eval()
    weights = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1] / "model.safetensors"
    load_weights(model, str(weights))
    with torch.no_grad():
        predictions = [found for images, _ in held_out.loader for found in model(images)]
    for what, prefix in (("bbox", ""), ("segm", "mask_"))[: 1 + (kind == "mask_rcnn")]:
        expected = scores_by_hand(root, predictions, what, without=("картина.png",))
        assert [report.get(prefix + name, -1) for name in SCORES] == pytest.approx(expected, abs=1e-6)
        assert expected[1] > 0


def test_a_run_on_index_masks(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    numbers = np.random.default_rng(0)
    for part in ("training", "validation"):
        for folder in ("images", "annotations"):
            (tmp_path / "ade" / folder / part).mkdir(parents=True)
        for place in range(8):
            size = 60 + 7 * place, 70
            mask = np.zeros(size, np.uint8)  # 0 is ignored
            mask[:, 10:40], mask[20:50, 30:] = 1, 2
            picture = (mask * 80 + numbers.integers(0, 40, size)).astype(np.uint8)
            Image.fromarray(np.stack([picture] * 3, 2)).save(tmp_path / "ade/images" / part / f"{place}.jpg")
            Image.fromarray(mask).save(tmp_path / "ade/annotations" / part / f"{place}.png")
    (tmp_path / "ade" / "classes.txt").write_text("Fluß\nsky\n", encoding="utf-8")
    keys = "image_size: 64, class_names: classes.txt, reduce_zero_label: true, workers: 0, photometric: false"
    data = f"data={{name: segmentation_folder, root: {tmp_path / 'ade'}, {keys}}}"
    config = dense_config("semantic_fpn", tmp_path / "run", data, "train.epochs=6", "optim.lr=3e-3")
    summary = train(config)
    assert (summary["images"], summary["steps"], summary["data"]["classes"]) == (8, 12, ["Fluß", "sky"])
    assert summary["miou"] > 0.5
    assert _evaluated(tmp_path / "run")["miou"] == summary["miou"]
