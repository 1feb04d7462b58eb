"""Routers for a pretrained model, fitted in closed form: without training and without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dge_models.budget import check_target
from dge_models.calibration import BudgetSetting, set_budget
from dge_models.finding import find_routed
from dge_models.projections import own_parameter, placement
from dge_models.ridge import Regression, Ridge
from dge_models.routed import routed_blocks
from dge_models.router import Router, split_costs
from dge_models.routing_stats import pixels_of, refuse_fixed, refuse_iterator
from dge_models.split_damage import LayerDamage, Reads, has_classes, measure_damage

__all__ = ["RouterFit", "fit_routers"]

_IMAGES_AT_ONCE = 8
# Damage below this share of the block's mean damage counts as this much, so that logarithms stay finite.
_LEAST_DAMAGE = 1e-12


@dataclass(frozen=True)
class RouterFit:
    """What :func:`fit_routers` did.

    Attributes:
        setting: What :func:`set_budget` reached afterwards.
        explained: Per routed block, in network order, the share of the variance of log(damage / saved MACs) that the
            regions' mean tokens explain, one value per split but the finest; NaN where nothing reads what the block's
            splits change.
        images: How many images the routers were fitted on.
        regions: Per routed block, how many regions that were.
    """

    setting: BudgetSetting
    explained: tuple[tuple[float, ...], ...]
    images: int
    regions: tuple[int, ...]


def fit_routers(
    model: nn.Module,
    loader: Iterable[Any],
    ratio: float,
    *,
    calibration: Iterable[Any] | None = None,
    reads: Reads | None = None,
    projections: int = 6,
    max_images: int = 256,
    seed: int = 0,
    tolerance: float = 0.02,
) -> RouterFit:
    """Make routers send the regions to coarse splits that the model's output depends on least, at a given MAC ratio.

    For a model whose weights are pretrained and whose routers are not, such as :func:`from_timm` gives. No weight but
    the routers' changes, no labels are needed, and nothing is iterated:

    1. With every region at its finest split, images run forward once and every block's other splits are computed
       beside. What a coarser split changes in a region's tokens, times the gradient of a random projection of the
       output, is how far the output moves along it. The mean of its square over projections is the damage.
    2. Ridge regression gives log(damage / saved MACs) from the region's mean token, per block and split. Half of the
       variance that it leaves is added: of a log-normal value that is the logarithm of the mean, and means are what
       adds up. Without it the blocks whose damage is hard to foresee, the first ones above all, look cheaper than
       they are.
    3. These become the routers' logits, so scaled that :func:`set_budget`'s price per query asks all blocks for the
       same damage per MAC, and :func:`set_budget` looks for the price that meets `ratio`.

    A block whose tokens nobody reads, such as the last one of a model that only gives a class token, gets the coarsest
    split everywhere. Memory is that of a forward and backward pass on at most eight images, and of C² numbers per
    block.

    Source: the second order of the output's change under random projections is that of Fisher's information, as in
    Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018; one price for all blocks is
    Lagrange's, as in Shoham and Gersho, 1988.

    Args:
        model: With routed blocks; changed in place. Modes and gradients of its parameters are kept.
        loader: Batches of images [B, C, H, W], or sequences that start with one, as for :func:`set_budget`. Of other
            kinds of pictures than the model will see it learns the wrong thing. Of few pictures, several random crops
            each tell more than one.
        ratio: Mean MAC ratio to reach, from the model's cheapest to 1.
        calibration: Images that the budget is set on, likewise, where they are others than those that routers are
            fitted on, such as whole pictures beside crops. None: `loader`.
        reads: What of the model's output is wanted. "class": the class probabilities, or without a head the pooled
            features. "tokens": the pooled features (or class token) and all other tokens, each half. None: "class"
            with a head, else "tokens".
        projections: Random directions per image. Each costs a backward pass.
        max_images: Fit on the loader's first so many images. The budget is set on all that there are.
        seed: Of the random directions.
        tolerance: As in :func:`set_budget`.

    Returns:
        What was reached, and how well the damage could be told.

    Raises:
        TypeError: The loader is an iterator or yields something else than images.
        ValueError: An argument is out of range, there are no images, the model has no routers or fixed queries,
            nothing reads any block's tokens, what it computes is not finite, or as in :func:`set_budget`. The model
            is then as it was.
    """
    check_target("ratio", ratio)
    for name, value in (("projections", projections), ("max_images", max_images)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}; expected a positive integer")
    model = find_routed(model)
    refuse_fixed(model)
    refuse_iterator(loader)
    if calibration is not None:
        refuse_iterator(calibration, "calibration")
    if any(len(block.router.splits) < 2 for block in routed_blocks(model)):
        raise ValueError("model: its routers have a single split; expected two or more to choose from")
    wanted = _default_reads(model) if reads is None else reads
    if wanted not in get_args(Reads):
        raise ValueError(f"reads: got {reads!r}; expected one of {', '.join(map(repr, get_args(Reads)))}")
    generator = torch.Generator().manual_seed(seed)
    fits = [_BlockFit(block.router) for block in routed_blocks(model)]
    images = 0
    for pixels in _few_at_once(model, loader, max_images):
        for fit, damage in zip(fits, measure_damage(model, pixels, projections, wanted, generator), strict=True):
            fit.add(damage)
        images += len(pixels)
    if not images:
        raise ValueError("loader: got no images; expected at least one batch of them")
    with _kept_on_failure(fits):
        explained = _write(fits, wanted)
        setting = set_budget(model, ratio, loader if calibration is None else calibration, tolerance=tolerance)
    return RouterFit(setting, explained, images, tuple(fit.regions for fit in fits))


class _BlockFit:
    """The regressions of one routed block: one per split but the finest, of going there from the next finer one."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.weight, self.bias = own_parameter(router.gate, "weight"), own_parameter(router.gate, "bias")
        self.ridges = [Ridge(self.weight.shape[1]) for _ in router.splits[1:]]
        self.lowest = torch.inf
        self.regions = 0

    def add(self, layer: LayerDamage) -> None:
        damage = layer.moved.square().mean(-1)
        if not (damage.isfinite().all() and layer.means.isfinite().all()):
            raise ValueError(
                "model: its tokens or gradients are not finite; expected trained weights and finite images"
            )
        self.regions += len(damage)
        for ridge, each, saved in zip(self.ridges, damage.unbind(1), layer.saved.unbind(1), strict=True):
            # Nothing reads a block without damage, and where the grid's edge clips a region two splits may be the same.
            kept = saved > 0 if each.any() else torch.zeros_like(saved, dtype=torch.bool)
            if kept.any():
                value = (each.clamp(min=_LEAST_DAMAGE * each.mean().item())[kept] / saved[kept]).log()
                ridge.add(layer.means[kept], value)
                self.lowest = min(self.lowest, value.min().item())

    def write(self, lowest: float) -> tuple[float, ...]:
        """Set the router's logits; `lowest` is the value of splits that do no damage. Returns what is explained."""
        costs = split_costs(self.router.splits).double()
        weight = torch.zeros(self.weight.shape, dtype=torch.float64)
        bias, explained = torch.zeros(len(costs), dtype=torch.float64), []
        for index, (ridge, step) in enumerate(zip(self.ridges, costs[:-1] - costs[1:], strict=True)):
            found = ridge.solve() if ridge.rows else Regression(torch.zeros(()), torch.tensor(lowest), math.nan, 0.0)
            # All finer splits gain, so that neighbours differ by what one saves, times its value.
            weight[: index + 1] += step * found.weights
            # The second term makes it the logarithm of the mean damage, not the mean of the logarithms.
            bias[: index + 1] += step * (found.intercept + found.left / 2)
            explained.append(found.explained)
        with torch.no_grad():
            self.weight.copy_(weight - weight.mean(0))
            self.bias.copy_(bias - bias.mean())
        return tuple(explained)


def _write(fits: list[_BlockFit], reads: str) -> tuple[tuple[float, ...], ...]:
    lowest = min(fit.lowest for fit in fits)
    if lowest == torch.inf:
        raise ValueError(
            f"reads: got {reads!r}, on which no routed block's tokens have an influence; expected 'tokens', or "
            "routed blocks before the last one"
        )
    return tuple(fit.write(lowest) for fit in fits)


def _default_reads(model: nn.Module) -> Reads:
    return "class" if has_classes(model) else "tokens"


def _few_at_once(model: nn.Module, loader: Iterable[Any], most: int) -> Iterator[Tensor]:
    """The first images of a loader, on the model's device."""
    device = placement(model)[0]
    for batch in loader:
        for pixels in pixels_of(batch)[:most].split(_IMAGES_AT_ONCE):
            if len(pixels):
                yield pixels.to(device)
            most -= len(pixels)
        if most <= 0:
            return


@contextmanager
def _kept_on_failure(fits: list[_BlockFit]) -> Iterator[None]:
    before = [(fit.weight.detach().clone(), fit.bias.detach().clone()) for fit in fits]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for fit, (weight, bias) in zip(fits, before, strict=True):
                fit.weight.copy_(weight)
                fit.bias.copy_(bias)
        raise
