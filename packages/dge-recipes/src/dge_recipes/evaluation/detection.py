"""Average precision of boxes and masks over held-out images, and their mean MACs.

The numbers are COCO's: torchmetrics asks faster-coco-eval, which computes what pycocotools does.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from dge_recipes.data.run_lengths import RunLengths, encode_masks
from dge_recipes.errors import UserError
from dge_recipes.evaluation.per_image import UNREAD, gather_images

__all__ = ["DetectionEvaluation", "DetectionResults", "detection_scores"]

_LIKELY = 0.5  # a pixel of a predicted mask from this probability on
# Our names of the metric's numbers.
_NAMES = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
}


@dataclass(frozen=True)
class DetectionEvaluation:
    """What an evaluation of a detector found.

    Attributes:
        images: images evaluated.
        ap: average precision of the boxes, from 0 to 1: mean over classes and over IoU thresholds 0.50, 0.55, ... 0.95,
            with at most 100 objects per image.
        ap50, ap75: the same at one threshold.
        ap_small, ap_medium, ap_large: the same of objects up to 32² pixels, up to 96², and larger, by the annotations'
            areas; None where the held-out images have no such object.
        mask_ap, mask_ap50, mask_ap75, mask_ap_small, mask_ap_medium, mask_ap_large: the same of masks; None for a
            detector of boxes.
        macs: mean multiply-accumulates per image of the whole detector.
        mac_ratio: the same over those of the detector with every query computed; 1 without routers.
        unreadable: images of the set that could not be read, and are in none of the other numbers.
    """

    images: int
    ap: float
    ap50: float
    ap75: float
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    macs: float
    mac_ratio: float
    unreadable: int = 0
    mask_ap: float | None = None
    mask_ap50: float | None = None
    mask_ap75: float | None = None
    mask_ap_small: float | None = None
    mask_ap_medium: float | None = None
    mask_ap_large: float | None = None

    @property
    def score(self) -> float:
        """What the best checkpoint is best in: AP of masks, where the detector has some, else of boxes."""
        return self.ap if self.mask_ap is None else self.mask_ap

    def as_dict(self) -> dict[str, float]:
        """For JSON; without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class _Objects:
    """Objects of an image, on the CPU: boxes float32 [N, 4] as corners, labels int64 [N], masks.

    Of detections `weight` is the score float32 [N], and `crowds` is empty; of true ones it is the area, with `crowds`
    int64 [N].
    """

    boxes: Tensor
    labels: Tensor
    weight: Tensor
    crowds: Tensor
    masks: tuple[RunLengths, ...]


@dataclass(frozen=True)
class _Result:
    found: _Objects
    true: _Objects
    macs: float
    static_macs: float


class DetectionResults:
    """Collects what a detector finds, batch by batch, in each process its share of the images.

    Args:
        masks: masks are compared too.
    """

    def __init__(self, *, masks: bool = False) -> None:
        self._masks, self._results = masks, dict[int, _Result | None]()

    def add(
        self,
        predictions: Sequence[Mapping[str, Tensor]],
        targets: Sequence[Mapping[str, Tensor]],
        macs: Tensor | Sequence[float],
        static_macs: Tensor | Sequence[float],
    ) -> None:
        """One batch.

        Args:
            predictions: per image ``boxes`` [N, 4] as corners in the image's pixels, ``labels`` [N] from 1,
                ``scores`` [N], and ``masks`` as probabilities [N, 1, H, W] or bool [N, H, W]: what torchvision's
                detectors return.
            targets: as the held-out loader yields them.
            macs: of each image, [B].
            static_macs: the same with every query computed.
        """
        for each in zip(predictions, targets, macs, static_macs, strict=True):
            place = int(each[1]["image_id"])
            self._results[place] = self._result(*each) if bool(each[1]["readable"]) else UNREAD

    def finish(self, accelerator: Accelerator, num_images: int, dataset: Any = None) -> DetectionEvaluation:
        """Score all images. Every process calls it; the main process computes.

        Args:
            accelerator: of this run.
            num_images: images in the set.
            dataset: the set, which is asked whether too many images could not be read.

        Returns:
            The same numbers in every process, whatever their number.

        Raises:
            RuntimeError: the images met are not those of the set.
            UserError: too few images could be read, or none shows an object; or torchmetrics or faster-coco-eval is
                not installed.
        """
        _metric_class()
        results = list(gather_images(self._results, accelerator, num_images, dataset).values())
        if not any(bool((result.true.crowds == 0).any()) for result in results):
            raise UserError(f"none of the {len(results)} held-out images shows an object, so nothing can be scored")
        shared: list[Any] = [None]
        if accelerator.is_main_process:
            shared = [_score([(each.found, each.true) for each in results], masks=self._masks)]
        scores: dict[str, float | None] = broadcast_object_list(shared)[0]
        macs, static_macs = sum(each.macs for each in results), sum(each.static_macs for each in results)
        return DetectionEvaluation(
            images=len(results),
            macs=macs / len(results),
            mac_ratio=macs / static_macs,
            unreadable=num_images - len(results),
            **scores,  # type: ignore[arg-type]
        )

    def _result(self, found: Mapping[str, Tensor], true: Mapping[str, Tensor], macs: Any, static_macs: Any) -> _Result:
        return _Result(_found(found, self._masks), _true(true, self._masks), float(macs), float(static_macs))


def detection_scores(
    predictions: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]], *, masks: bool = False
) -> dict[str, float | None]:
    """COCO's average precision.

    Args:
        predictions, targets: per image, as for :meth:`DetectionResults.add`.
        masks: masks are compared too.

    Returns:
        ``ap``, ``ap50``, ``ap75``, ``ap_small``, ``ap_medium`` and ``ap_large`` from 0 to 1, and with masks the same
        again after ``mask_``. None where there is no true object to find.

    Raises:
        UserError: torchmetrics or faster-coco-eval is not installed.
    """
    pairs = zip(predictions, targets, strict=True)
    return _score([(_found(found, masks), _true(true, masks)) for found, true in pairs], masks=masks)


def _found(prediction: Mapping[str, Tensor], masks: bool) -> _Objects:
    boxes, labels, scores = (prediction[name].detach().cpu() for name in ("boxes", "labels", "scores"))
    return _Objects(boxes.float(), labels, scores.float(), torch.empty(0), _encoded(prediction, masks))


def _true(target: Mapping[str, Tensor], masks: bool) -> _Objects:
    boxes, labels, areas, crowds = (target[name].cpu() for name in ("boxes", "labels", "area", "iscrowd"))
    return _Objects(boxes.float(), labels, areas.float(), crowds, _encoded(target, masks))


def _encoded(objects: Mapping[str, Tensor], wanted: bool) -> tuple[RunLengths, ...]:
    if not wanted:
        return ()
    masks = objects["masks"].detach()
    masks = masks.squeeze(1) if masks.ndim == 4 else masks
    return encode_masks(masks >= _LIKELY if masks.is_floating_point() else masks)


def _score(pairs: Iterable[tuple[_Objects, _Objects]], *, masks: bool) -> dict[str, float | None]:
    # torchmetrics' own thresholds are rounded to float32, which moves a recall of 0.05 to the other side of one.
    metric = _metric_class()(
        iou_type=("bbox", "segm") if masks else "bbox",
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
        backend="faster_coco_eval",
        sync_on_compute=False,  # only the main process asks, and by itself the metric would wait for the others
    )
    for found, true in pairs:
        metric.update(found, true)
    numbers = {name: float(value) for name, value in metric.compute().items() if value.numel() == 1}
    prefixes = {"bbox_": "", "segm_": "mask_"} if masks else {"": ""}
    return {
        f"{shown}{name}": None if numbers[f"{prefix}{given}"] < 0 else numbers[f"{prefix}{given}"]
        for prefix, shown in prefixes.items()
        for given, name in _NAMES.items()
    }


def _metric_class() -> Any:
    """torchmetrics' average precision, fed with masks that are run lengths already."""
    try:
        import faster_coco_eval  # noqa: F401
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError as error:
        raise UserError(
            'average precision needs torchmetrics and faster-coco-eval: pip install "dge-recipes[dense]"'
        ) from error

    class RunLengthPrecision(MeanAveragePrecision):
        def update(self, found: _Objects, true: _Objects) -> None:  # type: ignore[override, unused-ignore]
            for kind, each in (("detection", found), ("groundtruth", true)):
                corners = each.boxes
                sizes = corners[:, 2:] - corners[:, :2]
                getattr(self, f"{kind}_box").append(torch.cat([corners[:, :2], sizes], 1))
                getattr(self, f"{kind}_labels").append(each.labels)
                if "segm" in self.iou_type:
                    getattr(self, f"{kind}_mask").append(each.masks)
            self.detection_scores.append(found.weight)
            self.groundtruth_area.append(true.weight)
            self.groundtruth_crowds.append(true.crowds)

    return RunLengthPrecision
