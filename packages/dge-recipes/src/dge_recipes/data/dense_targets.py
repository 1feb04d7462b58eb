"""What images of dense prediction come with: boxes and masks of objects, or a class for every pixel; and how a loader
puts images together whose sizes differ."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "collate_lists", "collate_stacked", "detection_target", "segmentation_target"]

IGNORED = 255  # a pixel of an index mask that neither training nor evaluation looks at


def detection_target(
    boxes: Tensor,
    labels: Tensor,
    masks: Tensor | None,
    image_id: int,
    areas: Tensor | None = None,
    crowds: Tensor | None = None,
    *,
    readable: bool = True,
) -> dict[str, Tensor]:
    """The objects of an image, as torchvision's detectors and torchmetrics name them.

    Args:
        boxes: [N, 4], left, top, right, bottom in pixels.
        labels: [N], from 1; 0 is the background.
        masks: [N, H, W], or None where none are wanted.
        image_id: place of the image in its set.
        areas: [N], in pixels; None in training, which needs neither them nor what follows.
        crowds: [N], 1 where a box or mask stands for a crowd; None for none.
        readable: False for an image that could not be read, whose objects evaluation leaves out.

    Returns:
        ``boxes`` float32 [N, 4], ``labels`` int64 [N], ``image_id`` int64 [], ``masks`` uint8 [N, H, W] where wanted;
        for evaluation also ``area`` float32 [N], ``iscrowd`` int64 [N] and ``readable`` bool [].
    """
    target = {"boxes": boxes.float().reshape(-1, 4), "labels": labels.long(), "image_id": torch.tensor(image_id)}
    if masks is not None:
        target["masks"] = masks.to(torch.uint8)
    if areas is not None:
        target["area"] = areas.float()
        target["iscrowd"] = torch.zeros_like(target["labels"]) if crowds is None else crowds.long()
        target["readable"] = torch.tensor(readable)
    return target


def segmentation_target(mask: Tensor, image_id: int, *, readable: bool = True) -> dict[str, Tensor]:
    """The mask of an image to evaluate.

    Args:
        mask: [H, W], the class of each pixel or :data:`IGNORED`.
        image_id: place of the image in its set.
        readable: False for an image that could not be read, whose pixels evaluation leaves out.

    Returns:
        ``mask`` int64 [H, W], ``image_id`` int64 [] and ``readable`` bool [].
    """
    return {"mask": mask.long(), "image_id": torch.tensor(image_id), "readable": torch.tensor(readable)}


def collate_lists(items: Sequence[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
    """A batch of images of any sizes: the list of images, and that of their targets."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def collate_stacked(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch of images of one size: images float32 [B, 3, S, S], and masks int64 [B, S, S]."""
    images, masks = zip(*items, strict=True)
    return torch.stack(images), torch.stack(masks).long()
