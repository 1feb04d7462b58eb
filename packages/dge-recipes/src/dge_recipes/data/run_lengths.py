"""Masks of objects as COCO stores them: polygons and run lengths. faster-coco-eval's mask API does the work."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dge_recipes.errors import UserError

__all__ = ["RunLengths", "decode_segmentations", "encode_masks", "mask_api"]

# A mask as run lengths: (height, width), and COCO's compressed counts of its columns' runs.
RunLengths = tuple[tuple[int, int], bytes]

_CORNERS = 3


def mask_api() -> Any:
    """The module that encodes and decodes masks.

    Raises:
        UserError: it is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise UserError('masks of objects need faster-coco-eval: pip install "dge-recipes[dense]"') from error
    return mask


def encode_masks(masks: Tensor) -> tuple[RunLengths, ...]:
    """Masks as run lengths, which take a hundredth of the memory.

    Args:
        masks: [N, H, W], an object where not 0.
    """
    if not len(masks):
        return ()
    # The runs go down the columns: [N, W, H] in memory.
    columns = np.ascontiguousarray((masks != 0).to(torch.uint8).cpu().numpy().transpose(0, 2, 1))
    encoded = mask_api().encode(columns.transpose(2, 1, 0))
    height, width = masks.shape[-2:]
    return tuple(((int(height), int(width)), bytes(each["counts"])) for each in encoded)


def decode_segmentations(segmentations: Sequence[Any], height: int, width: int) -> Tensor:
    """Masks of a COCO annotation file.

    Args:
        segmentations: of each object its polygons, each ``[x, y, x, y, ...]`` in pixels, or its run lengths, a mapping
            with ``size`` and ``counts``. Polygons with fewer than three corners are nothing.
        height, width: of the image, in pixels.

    Returns:
        uint8 [N, height, width].

    Raises:
        ValueError: a segmentation is neither, or of another size.
    """
    api = mask_api()
    masks = torch.zeros(len(segmentations), height, width, dtype=torch.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        runs = _runs(api, segmentation, height, width)
        if runs is not None:
            mask.copy_(torch.from_numpy(api.decode(runs)))
    return masks


def _runs(api: Any, segmentation: Any, height: int, width: int) -> Any:
    """Compressed run lengths of one object; None for nothing."""
    if isinstance(segmentation, dict) and {"size", "counts"} <= set(segmentation):
        return _compressed(api, segmentation["size"], segmentation["counts"], height, width)
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError(f"got a {type(segmentation).__name__}, expected a list of polygons or run lengths")
    if not all(isinstance(value, int | float) for polygon in segmentation for value in polygon):
        raise ValueError("got a polygon of other things than numbers")
    # An odd number at the end is half a corner.
    polygons = [polygon[: len(polygon) // 2 * 2] for polygon in segmentation if len(polygon) >= 2 * _CORNERS]
    return api.merge(api.frPyObjects(polygons, height, width)) if polygons else None


def _compressed(api: Any, size: Any, counts: Any, height: int, width: int) -> Any:
    """Run lengths in the form that is decoded, once they are for an image of this size."""
    if size != [height, width]:
        raise ValueError(f"got size {size} of run lengths, expected [{height}, {width}]: the image's height and width")
    if isinstance(counts, str | bytes):
        runs = {"size": size, "counts": counts.encode() if isinstance(counts, str) else counts}
        try:
            told = int(api.area(runs))
        except (RuntimeError, ValueError) as error:
            raise ValueError("got counts of run lengths that are damaged") from error
        if told > height * width:
            raise ValueError(f"got run lengths of {told} pixels or more, expected {height * width}")
        return runs
    if not isinstance(counts, list) or not all(isinstance(run, int) and run >= 0 for run in counts):
        raise ValueError(f"got counts of type {type(counts).__name__} in run lengths, expected whole numbers or a text")
    if sum(counts) != height * width:
        raise ValueError(f"got run lengths of {sum(counts)} pixels, expected {height * width}")
    return api.frPyObjects({"size": size, "counts": counts}, height, width)
