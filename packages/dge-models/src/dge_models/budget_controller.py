"""A budget that is met: the price of a query follows from how far the model is from its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dge_models.budget import BudgetTerm, check_positive, check_target, mac_ratio
from dge_models.routing import Routing

__all__ = ["BudgetController"]

# The square deals with larger gaps. Were the multiplier to follow them, it would grow beyond all need while a
# model comes down from its first ratio, and drive it to its cheapest routing, where gates saturate.
_LARGEST_GAP = 0.05


class BudgetController(BudgetTerm):
    """``multiplier * (ratio - target) + weight * (ratio - target)²``, with a multiplier that learns.

    Dual ascent on the constraint "mean MAC ratio equals target": after every step the multiplier grows by
    ``rate * (ratio - target)``, the gap limited to ±0.05. It may become negative, which pays for queries, so the
    target is met from both sides. The square damps the ascent, as in augmented Lagrangian methods.

    Training routes with Gumbel noise and evaluation without, so the two ratios differ. The multiplier follows
    the ratio of the routers' choices without noise (:meth:`measure`), which is the one to meet; the gradient
    is, as always, that of the noisy gates.

    Args:
        target: MAC ratio to meet, in (0, 1].
        weight: Of the square, at least 0.
        rate: Growth of the multiplier per step and unit of ratio, at least 0.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, target: float = 0.5, weight: float = 8.0, rate: float = 0.2) -> None:
        super().__init__(check_target("target", target))
        self.target = float(target)
        self.weight = check_positive("weight", weight)
        self.rate = check_positive("rate", rate)
        self.multiplier = 0.0

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"target={self.target}, weight={self.weight}, rate={self.rate}"

    def penalty(self, ratio: Tensor) -> Tensor:
        """The augmented Lagrangian's terms."""
        gap = ratio - self.target
        return self.multiplier * gap + self.weight * gap**2

    def measure(self, model: nn.Module, routings: Sequence[Routing]) -> Tensor:
        """The ratio of the choices without noise: float32 [], without gradient. Average it over processes."""
        return mac_ratio(model, routings, noiseless=True)

    def update(self, ratio: float) -> None:
        """Raise the multiplier if `ratio` (see :class:`BudgetTerm`) is above the target, else lower it."""
        gap = float(ratio) - self.target
        self.multiplier += self.rate * min(max(gap, -_LARGEST_GAP), _LARGEST_GAP)

    def get_extra_state(self) -> dict[str, Any]:
        """What :meth:`state_dict` holds."""
        return {"multiplier": self.multiplier}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        self.multiplier = float(state["multiplier"])
