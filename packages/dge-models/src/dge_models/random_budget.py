"""Training for every budget at once: a target drawn per step, and the shift of the router logits that meets it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dge_models.budget import BudgetTerm, check_positive, check_target
from dge_models.routed import routed_blocks

__all__ = ["RandomBudget"]

_KNOTS = 9
_LARGEST_SHIFT = 1000.0
_ENDS = 0.1  # of the steps aim for the lowest ratio, and as many for the highest
_COMMON = 0.25  # of a step's correction goes to all knots
_LARGEST_GAIN = 16.0


class RandomBudget(BudgetTerm):
    """Draws a MAC ratio for each step and shifts the router logits so that the step meets it.

    One checkpoint then serves the whole range: the weights have worked at every budget, and the routers have
    learned which regions to refine first. Afterwards :func:`set_budget` picks a budget. Until then evaluation,
    which does not know the shifts, has no budget in particular.

    The shift for a target comes from a table of a few knots, linearly interpolated, that follows the measured
    ratios (dual ascent on one multiplier per knot): a step that spent too little raises the knots around its
    target, and all others a little, because the routers' own drift is much the same for every target.

    Draws depend on `seed` and the number of steps alone, so they are the same on every process and after a
    resume.

    Args:
        low: Smallest MAC ratio, in (0, 1] and not below the model's cheapest.
        high: Largest MAC ratio, above `low`, at most 1.
        skew: A uniform share of the range is raised to this power. Above 1 it prefers low targets: weights that work
            with few queries work with more, but not the other way round.
        price: Of the ratio, per unit of the table's mean shift downwards; at least 0. The task alone would let the
            routers ask for more at every step, against ever larger shifts, until noise no longer makes them try
            anything else; the price holds them where shifts stay small, and lets each region earn its queries.
        weight: Of the paper's penalty ``weight * (ratio - target)²``; at least 0.
        rate: Change of a shift per step and unit of ratio, at least 0.
        seed: Of the draws.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        low: float,
        high: float = 1.0,
        *,
        skew: float = 3.0,
        price: float = 0.2,
        weight: float = 0.0,
        rate: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__(check_target("low", low))
        if not check_target("high", high) > low:
            raise ValueError(f"high: got {high}; expected more than low, {low}")
        self.low, self.high, self.seed = float(low), float(high), int(seed)
        if not skew > 0:
            raise ValueError(f"skew: got {skew}; expected a positive number")
        self.skew = float(skew)
        self.price = check_positive("price", price)
        self.weight = check_positive("weight", weight)
        self.rate = check_positive("rate", rate)
        self._step = 0
        self._target = self.high
        self._knots = [0.0] * _KNOTS
        self._gains = [1.0] * _KNOTS
        self._signs = [0.0] * _KNOTS

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        names = ("low", "high", "skew", "price", "weight", "rate", "seed")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @property
    def target(self) -> float:
        """The MAC ratio drawn for the step under way."""
        return self._target

    def shift(self, target: float) -> float:
        """The shift that the table holds for a MAC ratio, see :meth:`Router.shift_training`."""
        left, share = self._place(target)
        return self._knots[left] * (1 - share) + self._knots[left + 1] * share

    def _place(self, target: float) -> tuple[int, float]:
        """The knot to the left of a target, and how far it is to the next one, in [0, 1]."""
        position = (target - self.low) / (self.high - self.low) * (_KNOTS - 1)
        left = min(max(int(position), 0), _KNOTS - 2)
        return left, position - left

    def begin_step(self, model: nn.Module) -> None:
        """Draw a target and shift the model's routers for it.

        Args:
            model: Holds routed blocks, wrapped or not.

        Raises:
            ValueError: It has none.
        """
        blocks = routed_blocks(model)
        if not blocks:
            raise ValueError(f"model: {type(model).__name__} has no routed block; expected a DGE model")
        # Torch's generator takes 32 bits; the factor keeps neighbouring seeds from sharing draws.
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + self._step) % 2**32)
        draw = torch.rand((), generator=generator, dtype=torch.float64).item()
        share = min(max((draw - _ENDS) / (1 - 2 * _ENDS), 0.0), 1.0)
        self._target = self.low + (self.high - self.low) * share**self.skew
        self._step += 1
        for block in blocks:
            block.router.shift_training(self.shift(self._target))

    def penalty(self, ratio: Tensor) -> Tensor:
        """The price of the ratio, and ``weight * (ratio - target)²`` for the target of this step."""
        price = -self.price * sum(self._knots) / len(self._knots)
        return price * ratio + self.weight * (ratio - self._target) ** 2

    def update(self, ratio: float) -> None:
        """Shift more at this step's target if `ratio` (see :class:`BudgetTerm`) is below it, else less."""
        gap = self._target - float(ratio)
        left, share = self._place(self._target)
        self._knots = [knot + _COMMON * self.rate * gap for knot in self._knots]
        for knot, weight in ((left, 1 - share), (left + 1, share)):
            self._adapt_gain(knot, gap, weight)
            self._knots[knot] += self.rate * self._gains[knot] * weight * gap
        self._knots = [min(max(knot, -_LARGEST_SHIFT), _LARGEST_SHIFT) for knot in self._knots]

    def _adapt_gain(self, knot: int, gap: float, weight: float) -> None:
        """Faster while a knot keeps missing on one side, slower where it has begun to swing.

        How far a shift moves the ratio depends on how large the logits have grown, which no constant can know.
        """
        if weight < 0.5:
            return
        sign = math.copysign(1.0, gap)
        if self._signs[knot]:
            self._gains[knot] *= 1.5 if sign == self._signs[knot] else 0.5
            self._gains[knot] = min(max(self._gains[knot], 0.5), _LARGEST_GAIN)
        self._signs[knot] = sign

    def get_extra_state(self) -> dict[str, Any]:
        """What :meth:`state_dict` holds."""
        tables = {"knots": list(self._knots), "gains": list(self._gains), "signs": list(self._signs)}
        return {"step": self._step, "target": self._target, **tables}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        if len(state["knots"]) != _KNOTS:
            raise ValueError(f"state: got a table of {len(state['knots'])} knots; expected {_KNOTS}")
        self._step, self._target = int(state["step"]), float(state["target"])
        self._knots, self._gains, self._signs = (list(map(float, state[key])) for key in ("knots", "gains", "signs"))
