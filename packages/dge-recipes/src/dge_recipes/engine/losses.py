"""Mixed targets, and the module that training wraps: its forward computes the losses, so that DDP sees all of it."""

from collections.abc import Sequence

import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

import dge_models
from dge_models import BudgetTerm, Routing
from dge_recipes.config.schema import Config
from dge_recipes.engine.budgets import build_budget
from dge_recipes.engine.distillation import distillation_loss
from dge_recipes.errors import UserError
from dge_recipes.models import is_routed

__all__ = ["LOSS_NAMES", "MEASURED", "SHARES", "LossModule", "TrainingLosses", "build_mixing", "split_shares"]

LOSS_NAMES = ("loss", "task", "distillation", "budget", "mac_ratio", "accuracy")
MEASURED = "measured_ratio"
SHARES = "split_shares"


def build_mixing(config: Config, num_classes: int) -> Mixup | None:
    """Mixup and CutMix, through timm's ``Mixup``, or None where both alphas are zero.

    It turns (images [B, C, H, W], labels int64 [B]) into (mixed images, soft labels float32 [B, classes]),
    label smoothing included. It draws from NumPy's global generator, which the loop seeds at each step.

    Raises:
        UserError: the batch size is odd; timm mixes pairs.
    """
    mixing = config.mixing
    if mixing.mixup == 0 and mixing.cutmix == 0:
        return None
    if config.train.batch_size % 2:
        raise UserError(f"mixup and cutmix pair images: train.batch_size must be even, got {config.train.batch_size}")
    return Mixup(
        mixup_alpha=mixing.mixup,
        cutmix_alpha=mixing.cutmix,
        prob=mixing.prob,
        switch_prob=mixing.switch_prob,
        label_smoothing=config.train.label_smoothing,
        num_classes=num_classes,
    )


class TrainingLosses(nn.Module):
    """What training wraps, whatever the task: a network with its loss, so that DDP sees all of both.

    ``forward(images, targets, answers)`` takes what the task's ``prepare`` gives and returns a dict of float32 []:
    ``loss`` to differentiate, and, detached, the other `names` and ``measured_ratio``, what the budget learns from.
    With them ``split_shares`` [L, n]: each routed layer's regions per split, as fractions; [0, 0] without routers.

    Attributes:
        model: the network.
        budget: the term that holds its MACs down.
        names: of the scalars that are logged: ``loss``, ``task``, ``distillation``, ``budget``, ``mac_ratio`` and the
            task's own.
    """

    model: nn.Module
    budget: BudgetTerm
    names: tuple[str, ...]


class LossModule(TrainingLosses):
    """A network with its training loss.

    Args:
        model: the network.
        config: label smoothing, mixing, distillation and budget.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.model, self.names = model, LOSS_NAMES
        # Mixed targets come smoothed.
        mixes = config.mixing.mixup > 0 or config.mixing.cutmix > 0
        self.label_smoothing = 0.0 if mixes else config.train.label_smoothing
        self.distillation = config.distillation
        self.budget = build_budget(config.budget, config.train.seed)

    def forward(self, images: Tensor, targets: Tensor, teacher: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            images: [B, C, H, W].
            targets: int64 labels [B], or class probabilities float [B, classes].
            teacher: the teacher's logits float32 [B, classes], or None without one.

        Returns:
            Scalars: ``loss`` to differentiate; and, detached, ``task`` (cross-entropy), ``distillation``,
            ``budget`` (penalty), ``mac_ratio`` and ``accuracy`` (against the likeliest class of a mixed target),
            fractions both, and ``measured_ratio``, what the budget learns from. ``split_shares`` [L, n]: each
            routed layer's regions per split, as fractions; [0, 0] without routers.
        """
        routings: Sequence[Routing] = ()
        if is_routed(self.model):
            output, routings = self.model.forward_routed(images)
            penalty = self.budget(self.model, routings)
            ratio = dge_models.mac_ratio(self.model, routings)
            measured = self.budget.measure(self.model, routings)
        else:
            output = self.model(images)
            penalty = images.new_zeros((), dtype=torch.float32)
            measured = ratio = penalty + 1
        # A model with a distillation token answers twice: the second head learns from the teacher.
        logits, second = (each.float() for each in (output if isinstance(output, tuple) else (output, output)))
        task = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        loss, distillation = task + penalty, torch.zeros_like(task)
        if teacher is not None:
            settings = self.distillation
            distillation = distillation_loss(second, teacher, settings.kind, settings.temperature)
            loss = (1 - settings.alpha) * task + settings.alpha * distillation + penalty
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        accuracy = (logits.argmax(1) == labels).float().mean()
        values = (task, distillation, penalty, ratio, accuracy)
        report = {name: value.detach() for name, value in zip(LOSS_NAMES[1:], values, strict=True)}
        return {"loss": loss, **report, MEASURED: measured.detach(), SHARES: split_shares(routings, images)}


def split_shares(routings: Sequence[Routing], images: Tensor) -> Tensor:
    """What each routed layer gave its regions, as fractions per split: float32 [L, n]; [0, 0] without routers."""
    if not routings:
        return images.new_zeros(0, 0)
    return torch.stack([routing.split_shares for routing in routings])
