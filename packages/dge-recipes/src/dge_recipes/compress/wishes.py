"""What a user wants of a compression."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Wishes"]


@dataclass(frozen=True)
class Wishes:
    """What a user wants.

    Attributes:
        ratio: mean MAC ratio to reach.
        method: one of ``METHODS``, or ``auto``: the best of those that fit the time. Distillation starts from routing,
            which is then made and measured too.
        splits: of routed regions, finest first.
        minutes: that all of it may take: ``auto`` leaves out what may take longer, and distillation takes what is left.
            None: ``auto`` leaves distillation out; distillation that is asked for takes half an hour.
        all_weights: distillation trains all weights, not norms, biases and layer scales alone; None: as
            :class:`~dge_recipes.compress.distill.Lesson` says.
        batch_size: pictures in a forward; of the timed ones too.
        seed: of all randomness.
    """

    ratio: float
    method: Literal["auto", "merge", "route", "distill"] = "auto"
    splits: tuple[int, ...] = (2, 1)
    minutes: float | None = None
    all_weights: bool | None = None
    batch_size: int = 8
    seed: int = 0
