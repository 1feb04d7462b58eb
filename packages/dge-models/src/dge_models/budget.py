"""Keeping a model's multiply-accumulates within a budget while it trains: the ratio, and the paper's penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dge_models.macs import LayerMacs, ModelMacs, model_macs
from dge_models.routing import Routing, count_queries, query_costs

__all__ = ["BudgetLoss", "BudgetTerm", "cheapest_ratio", "mac_ratio", "routed_macs"]


def routed_macs(model: nn.Module, routings: Sequence[Routing]) -> tuple[ModelMacs, list[LayerMacs]]:
    """The model's MACs at the routings' grid, and those of the layers that they belong to."""
    if not routings:
        raise ValueError("routings: got none; expected one per routed block of the model")
    macs = model_macs(model, routings[0].grid)
    layers = [layer for layer, routed in zip(macs.layers, macs.routed, strict=True) if routed]
    if len(layers) != len(routings):
        raise ValueError(f"routings: got {len(routings)}; expected one per routed block, {len(layers)}")
    return macs, layers


def mac_ratio(model: nn.Module, routings: Sequence[Routing], *, noiseless: bool = False) -> Tensor:
    """The whole model's MACs of a batch, relative to the MACs with every query computed.

    Where all images have one size it is the mean over images. Of a padded batch, see :func:`dge_models.padded`, it is
    the mean over all MACs of the images' own tokens: a region counts as much in a small image as in a large one.

    Args:
        model: What `routings` come from.
        routings: As ``model.forward_routed`` returns them.
        noiseless: Of what each router would have chosen without Gumbel noise, as it does in evaluation, instead
            of what it chose. Earlier layers keep their noise, and nothing is differentiable.

    Returns:
        float32 [], differentiable to the routers. NaN for an empty batch, as any mean.

    Raises:
        ValueError: `routings` are not the model's, or its MACs are not known.
    """
    if routings and routings[0].real_grids is not None:
        return _ratio_of_padded(model, routings, noiseless)
    macs, layers = routed_macs(model, routings)
    saved = [
        (layer.num_tokens - (_noiseless_queries(routing) if noiseless else routing.queries).mean())
        * (layer.per_query / macs.static)
        for routing, layer in zip(routings, layers, strict=True)
    ]
    return 1 - torch.stack(saved).sum()


def _ratio_of_padded(model: nn.Module, routings: Sequence[Routing], noiseless: bool) -> Tensor:
    """:func:`mac_ratio` of images of several sizes."""
    shares, tokens = _shares_per_query(model, routings)
    queries = torch.stack([_noiseless_queries(routing) if noiseless else routing.queries for routing in routings])
    return 1 - ((tokens.to(queries) - queries) * shares.to(queries)).sum()


def _shares_per_query(model: nn.Module, routings: Sequence[Routing]) -> tuple[Tensor, Tensor]:
    """What share of the batch's MACs one query is, and the tokens: float64 [L, B] per routed block and image."""
    images = images_macs(model, routings)
    static = sum(macs.static for macs, _ in images)
    per_query = [[layer.per_query / static for layer in layers] for _, layers in images]
    tokens = [[float(layer.num_tokens) for layer in layers] for _, layers in images]
    return torch.tensor(per_query, dtype=torch.float64).T, torch.tensor(tokens, dtype=torch.float64).T


def images_macs(model: nn.Module, routings: Sequence[Routing]) -> list[tuple[ModelMacs, list[LayerMacs]]]:
    """:func:`routed_macs` of each image of a padded batch, at its own grid."""
    grids = routings[0].real_grids or ()
    known = {grid: routed_macs(model, [replace(routings[0], grid=grid), *routings[1:]]) for grid in set(grids)}
    return [known[grid] for grid in grids]


def _noiseless_queries(routing: Routing) -> Tensor:
    """[B], the queries of the splits with the largest logits."""
    if routing.logits is None:
        return routing.queries.detach()
    cost = query_costs(routing)
    choice = routing.logits.argmax(-1, keepdim=True)
    return cost.expand_as(routing.logits).gather(-1, choice).sum((1, 2, 3)) + routing.num_prefix_tokens


def cheapest_ratio(model: nn.Module, routings: Sequence[Routing]) -> float:
    """The smallest :func:`mac_ratio` that routing can reach: every region at its coarsest split.

    Args:
        model: What `routings` come from.
        routings: As ``model.forward_routed`` returns them; only their grids matter.

    Raises:
        ValueError: As :func:`mac_ratio`.
    """
    if routings and routings[0].real_grids is not None:
        shares, tokens = _shares_per_query(model, routings)
        coarsest = [query_costs(routing)[..., -1].sum((1, 2)) + routing.num_prefix_tokens for routing in routings]
        return 1 - float(((tokens - torch.stack(coarsest).to(tokens)) * shares).sum())
    macs, layers = routed_macs(model, routings)
    saved = 0.0
    for routing, layer in zip(routings, layers, strict=True):
        cost = count_queries(routing.grid, routing.splits, torch.device("cpu"))
        saved += (layer.num_tokens - routing.num_prefix_tokens - float(cost[..., -1].sum())) * layer.per_query
    return 1 - saved / macs.static


def check_target(name: str, target: float) -> float:
    """`target` itself; a ValueError if it is no MAC ratio."""
    if not 0 < target <= 1:
        raise ValueError(f"{name}: got {target}; expected a MAC ratio in (0, 1]")
    return float(target)


class BudgetTerm(nn.Module):
    """What a training loop does for any budget: three calls per optimiser step.

    .. code-block:: python

        term.begin_step(model)                              # before the forward pass
        logits, routings = model.forward_routed(images)
        loss = task_loss(logits) + term(model, routings)    # then backward, and the optimiser's step
        term.update(mean_over_processes(term.measure(model, routings)))

    A term has no parameters and no buffers: nothing of it is moved, cast, averaged or broadcast with a model.
    What it has learned is in its ``state_dict()``, as plain numbers, and resumes exactly.

    Args:
        target: The lowest MAC ratio that the term aims for.
    """

    def __init__(self, target: float) -> None:
        super().__init__()
        self._lowest = target

    def begin_step(self, model: nn.Module) -> None:
        """Prepare a model for one step; with gradient accumulation, for all forward passes of one step."""

    def forward(self, model: nn.Module, routings: Sequence[Routing]) -> Tensor:
        """What to add to the task's loss.

        Args:
            model: What `routings` come from; of a wrapper such as DDP, the module inside.
            routings: As ``model.forward_routed`` returns them.

        Returns:
            float32 [], differentiable to the routers.

        Raises:
            ValueError: As :func:`mac_ratio`, or the target is below the model's cheapest routing.
        """
        cheapest = cheapest_ratio(model, routings)
        if self._lowest < cheapest - 1e-6:
            raise ValueError(
                f"target: got {self._lowest}; expected at least {cheapest:.4f}, the MAC ratio of the cheapest routing "
                "(every region at its coarsest split)"
            )
        return self.penalty(mac_ratio(model, routings))

    def penalty(self, ratio: Tensor) -> Tensor:
        """The term's loss at a MAC ratio, float32 []."""
        return ratio * 0

    def measure(self, model: nn.Module, routings: Sequence[Routing]) -> Tensor:
        """The MAC ratio that :meth:`update` wants: float32 [], without gradient. Average it over processes."""
        return mac_ratio(model, routings).detach()

    def update(self, ratio: float) -> None:
        """Learn from one step.

        Args:
            ratio: :meth:`measure`, averaged over the global batch, the same number on every process.
        """


class BudgetLoss(BudgetTerm):
    """``weight * (ratio - target)²`` for the whole model's :func:`mac_ratio`.

    Source: Song et al., NeurIPS 2021, section 3.3 (γ is `target`, λ is `weight`). The penalty is soft: a
    model may settle above its target; :class:`BudgetController` meets it.

    Args:
        target: MAC ratio to aim for, in (0, 1].
        weight: Of the penalty, at least 0.

    Raises:
        ValueError: `target` or `weight` is out of range.
    """

    def __init__(self, target: float = 0.5, weight: float = 1.0) -> None:
        super().__init__(check_target("target", target))
        self.target = float(target)
        self.weight = check_positive("weight", weight)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"target={self.target}, weight={self.weight}"

    def penalty(self, ratio: Tensor) -> Tensor:
        """``weight * (ratio - target)²``."""
        return self.weight * (ratio - self.target) ** 2


def check_positive(name: str, value: float) -> float:
    """`value` itself; a ValueError if it is negative or no number."""
    if not value >= 0:
        raise ValueError(f"{name}: got {value}; expected a number of at least 0")
    return float(value)
