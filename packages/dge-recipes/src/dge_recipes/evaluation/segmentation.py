"""Mean intersection over union and pixel accuracy over held-out images, and their mean MACs.

Pixels are counted in whole numbers, so that the result does not depend on the order of the images nor on how many
processes count them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dge_recipes.data.dense_targets import IGNORED
from dge_recipes.evaluation.per_image import UNREAD, gather_images

__all__ = ["SegmentationEvaluation", "SegmentationResults", "confusion_matrix", "segmentation_scores"]


@dataclass(frozen=True)
class SegmentationEvaluation:
    """What an evaluation of a segmenter found.

    Attributes:
        images: images evaluated.
        miou: intersection over union, from 0 to 1, mean over the classes that occur: those that some pixel of the
            held-out masks or of the predictions has.
        pixel_accuracy: share of the pixels, without the ignored ones, whose class is right.
        class_iou: intersection over union of each class; None for one that occurs in neither.
        macs: mean multiply-accumulates per image of the whole segmenter.
        mac_ratio: the same over those of the segmenter with every query computed; 1 without routers.
        unreadable: images of the set that could not be read, and are in none of the other numbers.
    """

    images: int
    miou: float
    pixel_accuracy: float
    class_iou: tuple[float | None, ...]
    macs: float
    mac_ratio: float
    unreadable: int = 0

    @property
    def score(self) -> float:
        """What the best checkpoint is best in: the mean intersection over union."""
        return self.miou

    @property
    def absent(self) -> int:
        """Classes that occur in neither masks nor predictions, and are not in the mean."""
        return sum(each is None for each in self.class_iou)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers alone, so without the single classes but with how many are not in the mean."""
        content = asdict(self)
        del content["class_iou"]
        return {**content, "absent_classes": self.absent}


@dataclass(frozen=True)
class _Result:
    """Of one image: the entries of its confusion matrix that are not 0, as places int64 [n] and numbers int64 [n]."""

    places: Tensor
    counts: Tensor
    macs: float
    static_macs: float


class SegmentationResults:
    """Collects what a segmenter predicts, batch by batch, in each process its share of the images.

    Args:
        num_classes: outputs of the segmenter.
    """

    def __init__(self, num_classes: int) -> None:
        self._num_classes, self._results = num_classes, dict[int, _Result | None]()

    def add(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        macs: Tensor | Sequence[float],
        static_macs: Tensor | Sequence[float],
    ) -> None:
        """One batch.

        Args:
            predictions: per image the classes int64 [H, W], in the size of the target's mask.
            targets: as the held-out loader yields them.
            macs: of each image, [B].
            static_macs: the same with every query computed.
        """
        for prediction, target, own, static in zip(predictions, targets, macs, static_macs, strict=True):
            place = int(target["image_id"])
            if not bool(target["readable"]):
                self._results[place] = UNREAD
                continue
            matrix = confusion_matrix(prediction, target["mask"], self._num_classes).flatten().cpu()
            places = matrix.nonzero().flatten()
            self._results[place] = _Result(places, matrix[places], float(own), float(static))

    def finish(self, accelerator: Accelerator, num_images: int, dataset: Any = None) -> SegmentationEvaluation:
        """Score all images. Every process calls it.

        Args:
            accelerator: of this run.
            num_images: images in the set.
            dataset: the set, which is asked whether too many images could not be read.

        Returns:
            The same numbers in every process, whatever their number.

        Raises:
            RuntimeError: the images met are not those of the set.
            UserError: too few images could be read.
        """
        results = list(gather_images(self._results, accelerator, num_images, dataset).values())
        matrix = torch.zeros(self._num_classes**2, dtype=torch.int64)
        for each in results:
            matrix.index_add_(0, each.places, each.counts)
        miou, accuracy, class_iou = segmentation_scores(matrix.view(self._num_classes, self._num_classes))
        macs, static_macs = sum(each.macs for each in results), sum(each.static_macs for each in results)
        return SegmentationEvaluation(
            images=len(results),
            miou=miou,
            pixel_accuracy=accuracy,
            class_iou=class_iou,
            macs=macs / len(results),
            mac_ratio=macs / static_macs,
            unreadable=num_images - len(results),
        )


def confusion_matrix(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each true class that were given each class.

    Args:
        prediction: integer [...], from 0.
        mask: integer [...], the same shape, from 0 or 255: ignored.
        num_classes: how many there are.

    Returns:
        int64 [true classes, predicted classes].

    Raises:
        ValueError: the shapes differ, or a class is out of range.
    """
    if prediction.shape != mask.shape:
        raise ValueError(f"prediction: got shape {tuple(prediction.shape)}; expected the mask's, {tuple(mask.shape)}")
    counted = mask != IGNORED
    true, given = mask[counted].long(), prediction[counted].long()
    for name, classes in (("mask", true), ("prediction", given)):
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise ValueError(
                f"{name}: got classes {int(classes.min())} to {int(classes.max())}; expected 0 to {num_classes - 1}"
            )
    return torch.bincount(true * num_classes + given, minlength=num_classes**2).view(num_classes, num_classes)


def segmentation_scores(matrix: Tensor) -> tuple[float, float, tuple[float | None, ...]]:
    """Scores of a confusion matrix.

    Args:
        matrix: int64 [true classes, predicted classes], pixels.

    Returns:
        Mean intersection over union of the classes that occur, the share of the pixels whose class is right, and the
        intersection over union of each class: None for one that is in neither masks nor predictions. All from 0 to 1;
        without a single pixel both means are 0.
    """
    counts = matrix.double().cpu()
    right, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    class_iou = tuple(float(a / b) if b > 0 else None for a, b in zip(right, union, strict=True))
    present = [each for each in class_iou if each is not None]
    total = float(counts.sum())
    return (
        sum(present) / len(present) if present else 0.0,
        float(right.sum()) / total if total else 0.0,
        class_iou,
    )
