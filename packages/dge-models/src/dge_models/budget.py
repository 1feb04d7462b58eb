"""Keeping a model's multiply-accumulates within a budget while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dge_models.macs import LayerMacs, ModelMacs, model_macs
from dge_models.routing import Routing

__all__ = ["BudgetLoss", "mac_ratio"]


def _routed_macs(model: nn.Module, routings: Sequence[Routing]) -> tuple[ModelMacs, list[LayerMacs]]:
    """The model's MACs at the routings' grid, and those of the layers that they belong to."""
    if not routings:
        raise ValueError("routings: got none; expected one per routed block of the model")
    macs = model_macs(model, routings[0].grid)
    layers = [layer for layer, routed in zip(macs.layers, macs.routed, strict=True) if routed]
    if len(layers) != len(routings):
        raise ValueError(f"routings: got {len(routings)}; expected one per routed block, {len(layers)}")
    return macs, layers


def mac_ratio(model: nn.Module, routings: Sequence[Routing]) -> Tensor:
    """Mean over images of the whole model's MACs, relative to the MACs with every query computed.

    Args:
        model: What `routings` come from.
        routings: As ``model.forward_routed`` returns them.

    Returns:
        float32 [], differentiable to the routers. NaN for an empty batch, as any mean.

    Raises:
        ValueError: `routings` are not the model's, or its MACs are not known.
    """
    macs, layers = _routed_macs(model, routings)
    saved = [
        (layer.num_tokens - routing.queries.mean()) * (layer.per_query / macs.static)
        for routing, layer in zip(routings, layers, strict=True)
    ]
    return 1 - torch.stack(saved).sum()


class BudgetLoss(nn.Module):
    """``weight * (ratio - target)²`` for the whole model's :func:`mac_ratio`.

    Source: Song et al., NeurIPS 2021, section 3.3 (γ is `target`, λ is `weight`). The penalty is soft: a
    model may settle above its target.

    Args:
        target: MAC ratio to aim for, in (0, 1].
        weight: Of the penalty, at least 0.

    Raises:
        ValueError: `target` or `weight` is out of range.
    """

    def __init__(self, target: float = 0.5, weight: float = 1.0) -> None:
        super().__init__()
        if not 0 < target <= 1:
            raise ValueError(f"target: got {target}; expected a MAC ratio in (0, 1]")
        if not weight >= 0:
            raise ValueError(f"weight: got {weight}; expected a number of at least 0")
        self.target = float(target)
        self.weight = float(weight)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"target={self.target}, weight={self.weight}"

    def forward(self, model: nn.Module, routings: Sequence[Routing]) -> Tensor:
        """The penalty for one batch; arguments and errors are those of :func:`mac_ratio`."""
        return self.weight * (mac_ratio(model, routings) - self.target) ** 2
