"""Means of what the loss module reports, between two log lines."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dge_recipes.training.losses import LOSS_NAMES, SHARES

__all__ = ["Averages"]


class Averages:
    """Means since the last report, kept on the device until they are asked for.

    They are part of a checkpoint, so that the log of a resumed run is that of a run that was never stopped.

    Args:
        accelerator: of this run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: Tensor | None = None
        self._count = 0
        self._shape: tuple[int, ...] = (0, 0)

    def scalars(self, losses: dict[str, Tensor]) -> Tensor:
        """The scalars of one forward as one tensor float32 [len(LOSS_NAMES)], on the device."""
        return torch.stack([losses[name].detach().float() for name in LOSS_NAMES])

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add one forward's numbers; no synchronisation with the device."""
        self._shape = tuple(losses[SHARES].shape)
        values = torch.cat([self.scalars(losses), losses[SHARES].flatten().float()])
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1

    def pop(self) -> dict[str, Any]:
        """Means over all processes since the last call, and ``split_shares`` if there are routers.

        Every process must call it. Waits for the device.
        """
        values = self._mean_sums().div(max(1, self._count)).tolist()
        self._sums, self._count = None, 0
        means: dict[str, Any] = dict(zip(LOSS_NAMES, values, strict=False))
        layers, splits = self._shape
        shares = values[len(LOSS_NAMES) :]
        if layers and shares:
            rows = [shares[layer * splits : (layer + 1) * splits] for layer in range(layers)]
            means[SHARES] = [[round(share, 4) for share in row] for row in rows]
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums so far; every process must call it."""
        return {"count": self._count, "shape": list(self._shape), "sums": self._mean_sums().tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved sums."""
        self._count, self._shape = state["count"], tuple(state["shape"])
        self._sums = torch.tensor(state["sums"], device=self._accelerator.device) if self._count else None

    def _mean_sums(self) -> Tensor:
        """The processes' mean of the sums."""
        size = len(LOSS_NAMES) + self._shape[0] * self._shape[1]
        sums = torch.zeros(size, device=self._accelerator.device) if self._sums is None else self._sums
        mean: Tensor = self._accelerator.reduce(sums, reduction="mean")
        return mean
