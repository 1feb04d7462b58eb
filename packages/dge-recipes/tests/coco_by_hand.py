"""COCO's scores as pycocotools computes them from two files, without the package that is tested."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

__all__ = ["scores_by_hand"]


def scores_by_hand(
    root: Path, predictions: Sequence[Mapping[str, Tensor]], kind: str, without: Collection[str] = ()
) -> list[float]:
    """AP, AP50, AP75, and AP of small, medium and large objects; -1 where there are none.

    Args:
        root: that ``write_coco`` wrote to.
        predictions: as torchvision's detectors return them, in the order of the ids of the images.
        kind: ``bbox`` or ``segm``.
        without: names of image files that are left out.
    """
    pytest.importorskip("pycocotools")
    from pycocotools import mask as mask_tools
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(root / "annotations" / "instances_val2017.json"))
    categories, found = sorted(truth.cats), []
    for image, prediction in zip(sorted(truth.imgs), predictions, strict=True):
        columns = (prediction[name].tolist() for name in ("boxes", "labels", "scores"))
        for place, (box, label, score) in enumerate(zip(*columns, strict=True)):
            left, top, right, bottom = box
            each: dict[str, Any] = {"image_id": image, "category_id": categories[label - 1], "score": score}
            if kind == "bbox":
                each["bbox"] = [left, top, right - left, bottom - top]
            else:
                mask = (prediction["masks"][place, 0] >= 0.5).numpy().astype(np.uint8)
                runs = mask_tools.encode(np.asfortranarray(mask))
                each["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
            found.append(each)
    file = root / f"{kind}.json"
    file.write_text(json.dumps(found), encoding="utf-8")
    evaluation = COCOeval(truth, truth.loadRes(str(file)), kind)
    evaluation.params.imgIds = [image for image in sorted(truth.imgs) if truth.imgs[image]["file_name"] not in without]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats[:6]]
