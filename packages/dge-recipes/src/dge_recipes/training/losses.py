"""The module that training wraps: its forward computes logits and losses, so that DDP sees all of it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dge_models
from dge_recipes.config.schema import Config
from dge_recipes.models import is_routed

__all__ = ["LOSS_NAMES", "LossModule"]

LOSS_NAMES = ("loss", "task", "budget", "mac_ratio", "accuracy")


class LossModule(nn.Module):
    """A network with its training loss.

    Args:
        model: the network.
        config: label smoothing, mixing and budget.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.model = model
        # Mixed targets come smoothed.
        mixes = config.mixing.mixup > 0 or config.mixing.cutmix > 0
        self.label_smoothing = 0.0 if mixes else config.train.label_smoothing
        self.budget = dge_models.BudgetLoss(config.budget.target, config.budget.weight)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            images: [B, C, H, W].
            targets: int64 labels [B], or class probabilities float [B, classes].

        Returns:
            Scalars: ``loss`` to differentiate; and, detached, ``task`` (cross-entropy), ``budget`` (penalty),
            ``mac_ratio`` and ``accuracy`` (against the likeliest class of a mixed target), fractions both.
        """
        if is_routed(self.model):
            logits, routings = self.model.forward_routed(images)
            penalty = self.budget(self.model, routings)
            ratio = dge_models.mac_ratio(self.model, routings)
        else:
            logits = self.model(images)
            penalty = logits.new_zeros((), dtype=torch.float32)
            ratio = penalty + 1
        task = F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        accuracy = (logits.argmax(1) == labels).float().mean()
        report = {"task": task, "budget": penalty, "mac_ratio": ratio, "accuracy": accuracy}
        return {"loss": task + penalty, **{name: value.detach() for name, value in report.items()}}
