"""Look at a model's routing from outside: one call, plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn

from dge_models.evaluating import evaluating
from dge_models.finding import find_routed
from dge_models.macs import count_from_routings, token_grid
from dge_models.merged import MergedTransformer
from dge_models.merging_trace import MergingTrace, find_merged, trace_merging

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

    Of images of several sizes, see :func:`dge_models.padded`, maps are those of the whole batch, with the coarsest
    split where an image is padded, and `static_macs` is the mean over images.
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


@overload  # a wrapper may hold either kind, which no type says
def trace(  # type: ignore[overload-overlap]
    model: MergedTransformer, images: Tensor
) -> MergingTrace: ...
@overload
def trace(model: nn.Module, images: Tensor) -> RoutingTrace: ...
def trace(model: nn.Module, images: Tensor) -> RoutingTrace | MergingTrace:
    """Classify images and report what each region got, or which tokens merged.

    Args:
        model: With routed blocks or from :func:`merge_tokens`, or a module that holds one such model, see
            :func:`find_routed`; the model is run, not what is around it. Its training mode is restored; no gradient is
            recorded.
        images: [B, C, H, W], on the model's device.

    Returns:
        The trace, of a merging model a :class:`MergingTrace`; `logits` and maps on the model's device, counts on the
        CPU.

    Raises:
        ValueError: The model has no routed block, or its MACs are not known.
    """
    merged = find_merged(model)
    if merged is not None:
        return trace_merging(merged, images)
    model = find_routed(model)
    with evaluating(model), torch.no_grad():
        logits, routings = model.forward_routed(images)
    macs = count_from_routings(model, routings, token_grid(model, images), images.shape[0])
    return RoutingTrace(
        logits=logits,
        granularity=[routing.choice for routing in routings],
        queries=torch.stack([routing.queries.long() for routing in routings]).cpu(),
        macs=macs.total,
        static_macs=macs.static_total,
        grids=[routing.grid for routing in routings],
    )
