"""Look at a model's routing from outside: one call, plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dge_models.evaluating import evaluating
from dge_models.macs import count_from_routings, token_grid
from dge_models.routed import RoutedModel

__all__ = ["RoutingTrace", "trace"]


@dataclass(frozen=True)
class RoutingTrace:
    """How B images went through a model with L routed blocks, in evaluation.

    Attributes:
        logits: [B, classes].
        granularity: One uint8 [B, Hr, Wr] per routed block, in network order; values index the split set,
            0 is the finest.
        queries: int64 [L, B], queries per image, prefix tokens included.
        macs: float64 [B], multiply-accumulates of the whole model.
        static_macs: The same with every query computed.
        grids: (H, W) of the token grid that the regions divide, per routed block; they differ in a pyramid.
    """

    logits: Tensor
    granularity: list[Tensor]
    queries: Tensor
    macs: Tensor
    static_macs: float
    grids: list[tuple[int, int]]

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the first routed block's token grid, the finest."""
        return self.grids[0]


def trace(model: RoutedModel, images: Tensor) -> RoutingTrace:
    """Classify images and report what each region got.

    Args:
        model: Its training mode is restored; no gradient is recorded.
        images: [B, C, H, W], on the model's device.

    Returns:
        The trace; `logits` and `granularity` on the model's device, counts on the CPU.

    Raises:
        ValueError: The model has no routed block, or its MACs are not known.
    """
    if not isinstance(model, RoutedModel):
        raise ValueError(f"model: got {type(model).__name__}; expected a model with routed blocks")
    with evaluating(model), torch.no_grad():
        logits, routings = model.forward_routed(images)
    if not routings:
        raise ValueError("model: none of its blocks is routed; expected at least one")
    macs = count_from_routings(model, routings, token_grid(model, images), images.shape[0])
    return RoutingTrace(
        logits=logits,
        granularity=[routing.choice for routing in routings],
        queries=torch.stack([routing.queries.long() for routing in routings]).cpu(),
        macs=macs.total,
        static_macs=macs.static_total,
        grids=[routing.grid for routing in routings],
    )
