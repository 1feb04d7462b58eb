"""Average precision: pycocotools' to 1e-6, with crowds, areas of the annotations, empty images and many detections."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from coco_by_hand import scores_by_hand
from coco_folder import write_coco
from torch import Tensor

from dge_recipes.config import CocoData
from dge_recipes.errors import UserError
from dge_recipes.evaluation.detection import DetectionEvaluation, DetectionResults, detection_scores

pytest.importorskip("torchmetrics")
pytest.importorskip("faster_coco_eval")

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def _write(folder: Path, side: int) -> list[dict[str, Tensor]]:
    """A folder of COCO's format; its held-out objects, with masks."""
    write_coco(folder, side=side)
    data = CocoData(name="coco", root=str(folder)).detection_images("val", None, folder, masks=True)
    return [data.images[index][1] for index in range(len(data.images))]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Held-out objects."""
    return _write(tmp_path_factory.mktemp("coco"), side=96)


def _predict(target: Mapping[str, Tensor], generator: torch.Generator, most: int = 20) -> dict[str, Tensor]:
    """True objects moved a little or much, found twice or not at all, under other labels too; and some of nothing."""
    boxes, labels, masks = [], [], []
    height, width = target["masks"].shape[1:]
    for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
        for _ in range(int(torch.randint(0, 4, (), generator=generator))):
            across, down = torch.randint(-6, 7, (2,), generator=generator).tolist()
            boxes.append(box + torch.tensor([across, down, across, down]) * 1.3)
            labels.append(int(label) if torch.rand((), generator=generator) < 0.8 else 1)
            masks.append(mask.roll((down, across), (0, 1)))
    for _ in range(int(torch.randint(0, most, (), generator=generator))):
        left, top, right, bottom = torch.rand(4, generator=generator).mul(90).tolist()
        boxes.append(torch.tensor([left, top, left + right, top + bottom]))
        labels.append(int(torch.randint(1, 4, (), generator=generator)))
        mask = torch.zeros(height, width, dtype=torch.uint8)
        mask[int(top) : int(top + bottom), int(left) : int(left + right)] = 1
        masks.append(mask)
    count = len(boxes)
    return {
        "boxes": torch.stack(boxes) if count else torch.zeros(0, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.rand(count, generator=generator),
        "masks": (torch.stack(masks).float() if count else torch.zeros(0, height, width)).unsqueeze(1),
    }


@pytest.mark.parametrize(("side", "most"), [(320, 20), (96, 300)])
def test_scores_are_those_of_pycocotools(tmp_path: Path, side: int, most: int) -> None:
    targets = _write(tmp_path, side)
    generator = torch.Generator().manual_seed(1)
    predictions = [_predict(target, generator, most) for target in targets]
    assert (max(len(each["labels"]) for each in predictions) > 100) == (most > 100)
    assert {len(target["labels"]) for target in targets} >= {0, 1, 3}
    assert sum(int(target["iscrowd"].sum()) for target in targets) == 1
    scores = detection_scores(predictions, targets, masks=True)
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        expected = scores_by_hand(tmp_path, predictions, kind)
        assert (min(expected) > 0) == (side > 100)  # there are objects of every size
        assert [scores[prefix + name] or -1.0 for name in NAMES] == pytest.approx(
            [each or -1.0 for each in expected], abs=1e-6
        )
        assert 0 < expected[0] < expected[1] < 1
    boxes = detection_scores(predictions, targets)
    assert boxes == pytest.approx({name: scores[name] for name in NAMES}, abs=1e-7)


def test_areas_are_those_of_the_annotations() -> None:
    """A box of 60 x 60 whose annotation says that its object is small."""
    target = {
        "boxes": torch.tensor([[0.0, 0.0, 60.0, 60.0]]),
        "labels": torch.tensor([1]),
        "area": torch.tensor([500.0]),
        "iscrowd": torch.tensor([0]),
    }
    found = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.tensor([0.9])}
    scores = detection_scores([found], [target])
    assert scores == {"ap": 1, "ap50": 1, "ap75": 1, "ap_small": 1, "ap_medium": None, "ap_large": None}


def _results(predictions: Any, targets: Any, places: list[int], masks: bool = True) -> DetectionResults:
    results = DetectionResults(masks=masks)
    for start in range(0, len(places), 5):
        part = places[start : start + 5]
        batch = [predictions[place] for place in part], [targets[place] for place in part]
        results.add(*batch, torch.tensor([float(place) for place in part]), [100.0] * len(part))
    return results


def test_an_evaluation_counts_every_image_once(
    targets: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    predictions = [_predict(target, generator) for target in targets]
    expected = detection_scores(predictions, targets, masks=True)
    accelerator = Accelerator(cpu=True)
    # In another order, and with two images again at the end, as Accelerate pads.
    result = _results(predictions, targets, [3, 2, 1, 0, *range(4, 12), 0, 1]).finish(accelerator, 12)
    assert result == DetectionEvaluation(
        images=12,
        macs=5.5,
        mac_ratio=66 / 1200,
        **expected,  # type: ignore[arg-type]
    )
    assert result.score == result.mask_ap
    assert set(result.as_dict()) >= {"images", "ap", "mask_ap", "macs", "mac_ratio", "unreadable"}
    assert None not in result.as_dict().values()
    boxes = _results(predictions, targets, list(range(12)), masks=False).finish(accelerator, 12)
    assert (boxes.score, boxes.ap, boxes.mask_ap) == (boxes.ap, result.ap, None)
    assert "mask_ap" not in boxes.as_dict()

    # Two processes: each has its share, and one of them an image of the other's.
    shares = [
        _results(predictions, targets, places)._results for places in ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11, 0])
    ]
    monkeypatch.setattr("dge_recipes.evaluation.per_image.gather_object", lambda own: [*own, *shares[1].items()])
    both = _results(predictions, targets, [0, 1, 4, 5, 8, 9]).finish(accelerator, 12)
    assert both == result


def test_unreadable_images_are_left_out_and_counted(targets: list[dict[str, Tensor]]) -> None:
    generator = torch.Generator().manual_seed(3)
    predictions = [_predict(target, generator) for target in targets]
    marked = [dict(target) for target in targets]
    marked[3]["readable"] = torch.tensor(False)
    others = [place for place in range(12) if place != 3]
    result = _results(predictions, marked, list(range(12)), masks=False).finish(Accelerator(cpu=True), 12)
    expected = detection_scores([predictions[place] for place in others], [targets[place] for place in others])
    assert (result.images, result.unreadable, result.ap) == (11, 1, expected["ap"])
    assert result.macs == sum(others) / 11


def test_what_cannot_be_scored(targets: list[dict[str, Tensor]]) -> None:
    generator = torch.Generator().manual_seed(3)
    predictions = [_predict(target, generator) for target in targets]
    accelerator = Accelerator(cpu=True)
    with pytest.raises(RuntimeError, match="evaluated 3 different images, but the data set has 12"):
        _results(predictions, targets, [0, 1, 2]).finish(accelerator, 12)
    empty = next(place for place in range(12) if not len(targets[place]["labels"]))
    results = DetectionResults()
    results.add([predictions[empty]], [{**targets[empty], "image_id": torch.tensor(0)}], [1.0], [1.0])
    with pytest.raises(UserError, match="none of the 1 held-out images shows an object"):
        results.finish(accelerator, 1)
    results = DetectionResults()
    unread = {**targets[0], "image_id": torch.tensor(0), "readable": torch.tensor(False)}
    results.add([predictions[0]], [unread], [1.0], [1.0])
    with pytest.raises(UserError, match="none of the 1 held-out images can be read"):
        results.finish(accelerator, 1)


def test_without_the_libraries_it_is_told_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.detection", None)
    with pytest.raises(UserError, match=r'torchmetrics and faster-coco-eval: pip install "dge-recipes\[dense\]"$'):
        detection_scores([], [])
