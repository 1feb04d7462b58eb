"""The modules that training wraps for detection and segmentation: network and losses, the budget's among them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dge_models
from dge_models import Routing
from dge_recipes.config import BudgetConfig
from dge_recipes.dense.backbones import routed_backbone
from dge_recipes.engine.budgets import build_budget
from dge_recipes.engine.losses import MEASURED, SHARES, TrainingLosses, split_shares

__all__ = ["IGNORED", "DetectionLosses", "SegmentationLosses"]

IGNORED = 255
"""The label of pixels that count neither in training nor in evaluation."""

_SHARED = ("loss", "task", "distillation", "budget", "mac_ratio")
_TERMS = {
    "retinanet": ("classification", "bbox_regression"),
    "faster_rcnn": ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"),
    "mask_rcnn": ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"),
}


class _DenseLosses(TrainingLosses):
    """What both tasks share: the task's loss and the budget's penalty from one forward pass.

    Args:
        model: a detector or segmenter; without a routed backbone the budget costs nothing.
        budget: the ``budget`` section.
        seed: the run's, for a budget that draws.
    """

    def __init__(self, model: nn.Module, budget: BudgetConfig, seed: int) -> None:
        super().__init__()
        self.model = model
        self.budget = build_budget(budget, seed)

    def task_losses(self, images: Any, targets: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms to be summed, and numbers to be reported beside them, scalars all."""
        raise NotImplementedError

    def forward(self, images: Any, targets: Any, teacher: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            images, targets: as the task's loader yields them.
            teacher: None; there is no distillation here.

        Returns:
            Scalars: ``loss`` to differentiate; and, detached, ``task``, the sum of the head's own terms, each of
            these, ``distillation`` (0), ``budget`` (penalty), ``mac_ratio`` of the backbone, and ``measured_ratio``,
            what the budget learns from. ``split_shares`` [L, n]: each routed layer's regions per split, as fractions;
            [0, 0] without routers.

        Raises:
            ValueError: a teacher's answers are given.
        """
        if teacher is not None:
            raise ValueError("teacher: got a tensor; expected None, detection and segmentation have no distillation")
        routings: Sequence[Routing] = ()
        if routed_backbone(self.model) is not None:
            with dge_models.collect_routings(self.model) as collected:
                terms, beside = self.task_losses(images, targets)
            model, routings = collected.model, collected.routings
            penalty = self.budget(model, routings)
            ratio = dge_models.mac_ratio(model, routings)
            measured = self.budget.measure(model, routings)
        else:
            terms, beside = self.task_losses(images, targets)
            penalty = torch.zeros_like(next(iter(terms.values())), dtype=torch.float32)
            measured = ratio = penalty + 1
        task = torch.stack([term.float() for term in terms.values()]).sum()
        report = {"task": task, "distillation": torch.zeros_like(task), "budget": penalty, "mac_ratio": ratio}
        report = {name: value.detach() for name, value in {**report, **terms, **beside, MEASURED: measured}.items()}
        return {"loss": task + penalty, **report, SHARES: split_shares(routings, task)}


class DetectionLosses(_DenseLosses):
    """A detector with its training losses; `names` are torchvision's.

    Batches are lists of images float32 [3, H, W] and of dicts with ``boxes`` float32 [N, 4] (xyxy, pixels), ``labels``
    int64 [N] from 1 and, for Mask R-CNN, ``masks`` uint8 [N, H, W].

    Args:
        model: from :func:`~dge_recipes.dense.detectors.build_detector`.
        kind: ``head.kind``.
        budget: the ``budget`` section.
        seed: the run's.
    """

    def __init__(self, model: nn.Module, kind: str, budget: BudgetConfig, seed: int = 0) -> None:
        super().__init__(model, budget, seed)
        self.names = (*_SHARED, *_TERMS[kind])

    def task_losses(
        self, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """torchvision's terms."""
        return self.model(images, targets), {}


class SegmentationLosses(_DenseLosses):
    """A segmenter with its training loss: cross-entropy, the mean over the batch's pixels that are not ignored.

    Batches are images float32 [B, 3, H, W] and masks int64 [B, H, W], :data:`IGNORED` where no class is known.
    Beside the losses ``pixel_accuracy`` is reported, a fraction.

    Args:
        model: from :func:`~dge_recipes.dense.segmenters.build_segmenter`.
        budget: the ``budget`` section.
        seed: the run's.
    """

    def __init__(self, model: nn.Module, budget: BudgetConfig, seed: int = 0) -> None:
        super().__init__(model, budget, seed)
        self.names = (*_SHARED, "pixel_accuracy")

    def task_losses(self, images: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The cross-entropy, and the accuracy."""
        logits = self.model(images).float()
        known = targets != IGNORED
        count = known.sum().clamp(min=1)
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / count
        right = ((logits.detach().argmax(1) == targets) & known).sum()
        return {"cross_entropy": loss}, {"pixel_accuracy": right / count}
