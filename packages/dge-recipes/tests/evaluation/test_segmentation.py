"""Mean intersection over union and pixel accuracy: exact counts, without ignored pixels and absent classes."""

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from dge_recipes.data.dense_targets import IGNORED, segmentation_target
from dge_recipes.errors import UserError
from dge_recipes.evaluation.segmentation import (
    SegmentationEvaluation,
    SegmentationResults,
    _Result,
    confusion_matrix,
    segmentation_scores,
)

CLASSES = 5


def _pairs(count: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Predictions and masks of several sizes; class 4 is in neither, class 3 is predicted alone."""
    generator, pairs = torch.Generator().manual_seed(0), []
    for number in range(count):
        shape = (6 + number, 9)
        mask = torch.randint(0, 3, shape, generator=generator)
        prediction = torch.where(torch.rand(shape, generator=generator) < 0.7, mask, 3)
        mask[0, :3] = IGNORED
        pairs.append((prediction, mask))
    return pairs


def _plain(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float, list[float | None]]:
    """The definition, pixel by pixel."""
    both = [
        (int(a), int(b))
        for given, true in pairs
        for a, b in zip(given.flatten(), true.flatten(), strict=True)
        if b != IGNORED
    ]
    shares: list[float | None] = []
    for label in range(CLASSES):
        union = sum(label in pair for pair in both)
        shares.append(sum(pair == (label, label) for pair in both) / union if union else None)
    present = [share for share in shares if share is not None]
    return sum(present) / len(present), sum(a == b for a, b in both) / len(both), shares


def _results(pairs: list[tuple[Tensor, Tensor]], places: list[int]) -> SegmentationResults:
    results = SegmentationResults(CLASSES)
    for place in places:
        target = segmentation_target(pairs[place][1], place)
        results.add([pairs[place][0]], [target], torch.tensor([float(place)]), torch.tensor([10.0]))
    return results


def test_scores_are_as_defined() -> None:
    pairs = _pairs()
    matrix = sum((confusion_matrix(*pair, CLASSES) for pair in pairs), torch.zeros(CLASSES, CLASSES, dtype=torch.int64))
    assert matrix.dtype == torch.int64
    assert int(matrix.sum()) == sum(int((mask != IGNORED).sum()) for _, mask in pairs)
    miou, accuracy, shares = segmentation_scores(matrix)
    expected = _plain(pairs)
    assert (miou, accuracy) == pytest.approx(expected[:2], abs=1e-12)
    assert list(shares) == pytest.approx(expected[2], abs=1e-12)
    assert shares[3] == 0.0  # predicted where it is not
    assert shares[4] is None


def test_an_evaluation_counts_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, accelerator = _pairs(), Accelerator(cpu=True)
    miou, accuracy, shares = _plain(pairs)
    result = _results(pairs, [6, 5, 4, 3, 2, 1, 0, 6, 6]).finish(accelerator, 7)
    assert result == SegmentationEvaluation(
        images=7,
        miou=pytest.approx(miou),
        pixel_accuracy=pytest.approx(accuracy),
        class_iou=tuple(None if share is None else pytest.approx(share) for share in shares),
        macs=3.0,
        mac_ratio=0.3,
    )
    assert (result.score, result.absent) == (result.miou, 1)
    assert result.as_dict()["absent_classes"] == 1
    shares_of_others = _results(pairs, [1, 3, 5, 0])._results.items()
    monkeypatch.setattr("dge_recipes.evaluation.per_image.gather_object", lambda own: [*own, *shares_of_others])
    assert _results(pairs, [0, 2, 4, 6]).finish(accelerator, 7) == result


def test_unreadable_images_are_left_out_and_counted() -> None:
    pairs = _pairs()
    results = _results(pairs, list(range(6)))
    results.add([pairs[6][0]], [segmentation_target(pairs[6][1], 6, readable=False)], [1.0], [1.0])
    result = results.finish(Accelerator(cpu=True), 7)
    assert (result.images, result.unreadable) == (6, 1)
    assert result.miou == pytest.approx(_plain(pairs[:6])[0])
    with pytest.raises(RuntimeError, match="evaluated 7 different images, but the data set has 9"):
        results.finish(Accelerator(cpu=True), 9)
    results = SegmentationResults(CLASSES)
    results.add([pairs[6][0]], [segmentation_target(pairs[6][1], 0, readable=False)], [1.0], [1.0])
    with pytest.raises(UserError, match="none of the 1 held-out images can be read"):
        results.finish(Accelerator(cpu=True), 1)


def test_pixels_are_summed_as_whole_numbers() -> None:
    """Floating-point numbers would lose the ones."""
    counts = torch.tensor([2**60, 0, 1, 2**60])
    results = SegmentationResults(2)
    results._results = {
        place: _Result(torch.arange(4), each, 1.0, 1.0) for place, each in enumerate((counts, 1 - counts))
    }
    assert results.finish(Accelerator(cpu=True), 2).pixel_accuracy == 0.5


def test_ignored_alone() -> None:
    matrix = confusion_matrix(torch.zeros(3, 3, dtype=torch.int64), torch.full((3, 3), IGNORED), 2)
    assert segmentation_scores(matrix) == (0.0, 0.0, (None, None))


def test_what_does_not_fit_is_told() -> None:
    mask = torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"prediction: got shape \(3, 3\); expected the mask's, \(3, 4\)"):
        confusion_matrix(torch.zeros(3, 3, dtype=torch.int64), mask, 2)
    with pytest.raises(ValueError, match="prediction: got classes 5 to 5; expected 0 to 1"):
        confusion_matrix(mask + 5, mask, 2)
    with pytest.raises(ValueError, match="mask: got classes 2 to 2; expected 0 to 1"):
        confusion_matrix(mask, mask + 2, 2)
