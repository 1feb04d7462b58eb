"""Accuracy and mean MACs over held-out images, each image counted once on any number of processes."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

import dge_models
from dge_recipes.classes import ClassMatch
from dge_recipes.data.images import UNREADABLE, HeldOutImages
from dge_recipes.data.workers import watched
from dge_recipes.errors import UserError
from dge_recipes.models import is_routed

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        images: images evaluated.
        acc1, acc5: top-1 and top-5 accuracy, in percent.
        loss: mean cross-entropy, in nats.
        macs: mean multiply-accumulates per image of the whole model.
        mac_ratio: the same over those of the model with every query computed; 1 without routers.
        unreadable: images of the set that could not be read, and are in none of the other numbers.
    """

    images: int
    acc1: float
    acc5: float
    loss: float
    macs: float
    mac_ratio: float
    unreadable: int = 0

    @property
    def score(self) -> float:
        """What the best checkpoint has most of."""
        return self.acc1

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Accelerator,
    num_images: int,
    after_batch: Callable[[], None] = lambda: None,
    match: ClassMatch | None = None,
) -> Evaluation:
    """Evaluate a model, each process its share of the images.

    Args:
        model: the network without wrappers, on the accelerator's device; its mode is restored.
        loader: prepared by the accelerator; yields (images [B, C, H, W], labels int64 [B]).
        accelerator: of this run.
        num_images: images in the data set.
        after_batch: called in every process; what it raises ends the evaluation.
        match: how the labels meet the model's outputs; None: label k is output k.

    Returns:
        The same numbers in every process, whatever their number.

    Raises:
        RuntimeError: the number of images met is not `num_images`.
        UserError: none of the images could be read, or fewer than the data set's ``max_unreadable`` asks for.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(5, dtype=torch.float64)
    static, met = 0.0, 0
    with torch.no_grad():
        for images, labels in watched(loader):
            with accelerator.autocast():
                logits, macs, static = _classify(model, images)
            readable = (labels != UNREADABLE).float()
            if match is not None:
                logits, labels = match(logits, labels)
            numbers = _scores(logits.float(), labels.clamp(min=0))
            scores = torch.stack([readable, *numbers, macs.float().to(logits.device)], dim=1)
            # The padding that makes the last batches equal is dropped here.
            scores = accelerator.gather_for_metrics(scores).double().cpu()
            met += len(scores)
            totals += scores[scores[:, 0] == 1].sum(0)
            after_batch()
    model.train(was_training)
    count, top1, top5, loss, macs_total = totals.tolist()
    if met != num_images:
        raise RuntimeError(f"evaluated {met} images, but the data set has {num_images}")
    if count == 0:
        raise UserError(f"none of the {num_images} held-out images can be read")
    data = getattr(loader, "dataset", None)
    if isinstance(data, HeldOutImages):  # a process alone meets only its share of them
        data.check_skipped(num_images - int(count))
    images, macs_mean = int(count), macs_total / count
    return Evaluation(
        images=images,
        acc1=100 * top1 / images,
        acc5=100 * top5 / images,
        loss=loss / images,
        macs=macs_mean,
        mac_ratio=macs_mean / static,
        unreadable=num_images - images,
    )


def _classify(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, float]:
    """Logits [B, classes], MACs of each image float64 [B], and the MACs of an image with every query."""
    if is_routed(model):
        routed = dge_models.trace(model, images)
        return routed.logits, routed.macs, routed.static_macs
    count = dge_models.count_macs(model, images)
    return model(images), count.total, count.static_total


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per image: 1 where right at the first guess, 1 where among five, cross-entropy."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels.unsqueeze(1)
    loss = F.cross_entropy(logits, labels, reduction="none")
    return hits[:, 0].float(), hits.any(1).float(), loss
