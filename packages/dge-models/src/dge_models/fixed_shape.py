"""Static shapes from the weights of a dynamic model: a fixed number of queries per image in every routed layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dge_models.budget import check_target, routed_macs
from dge_models.evaluating import evaluating
from dge_models.fixed_layout import FixedLayout
from dge_models.observing import observe, refuse_fixed, require_routers
from dge_models.routed import routed_blocks
from dge_models.routing import Routing, region_grid

__all__ = ["FixedQueries", "mean_counts", "set_dynamic_queries", "set_fixed_queries"]

Counts = tuple[int, ...]


@dataclass(frozen=True)
class FixedQueries:
    """What :func:`set_fixed_queries` did, one entry per routed block in network order.

    Attributes:
        counts: Regions of an image that get each split, finest first.
        queries: Queries per image, prefix tokens included.
        ratio: The whole model's MACs, relative to those with every query computed.
    """

    counts: tuple[Counts, ...]
    queries: tuple[int, ...]
    ratio: float


def set_fixed_queries(
    model: nn.Module,
    ratio_or_counts: float | Sequence[int] | Sequence[Sequence[int]],
    *,
    image_size: tuple[int, int] | None = None,
) -> FixedQueries:
    """Compute the same number of queries for every image in evaluation, those regions first that gain most.

    All shapes are then static and all operators plain PyTorch, for CUDA graphs, ONNX and TensorRT. Weights are
    not touched, training stays dynamic, and :func:`set_dynamic_queries` ends it. Not stored in checkpoints: set
    it again after loading.

    Args:
        model: With routed blocks; changed in place.
        ratio_or_counts: A MAC ratio in (0, 1] not to exceed: every layer then gives its finest split to as many
            regions as it can afford at one share of its range, what is left buys the next splits. Or how many
            regions of an image get each split, finest first: one tuple for all routed layers, or one for each,
            for example from :func:`mean_counts`.
        image_size: (H, W) in pixels of the images to come; None means the model's own input size.

    Returns:
        What was set.

    Raises:
        ValueError: The model has no routers, a ratio is outside its range (the error says which), or counts don't
            fit the regions.
    """
    require_routers(model)
    blocks = routed_blocks(model)
    before = [block.fixed_layout for block in blocks]
    set_dynamic_queries(model)
    try:
        routings = _dynamic_routings(model, image_size)
        wanted = _wanted_counts(model, ratio_or_counts, routings)
        layouts = _layouts(model, routings, wanted)
    except BaseException:
        for block, layout in zip(blocks, before, strict=True):
            block.fixed_layout = layout
        raise
    for block, fresh in zip(blocks, layouts, strict=True):
        block.fixed_layout = fresh
    queries = tuple(layout.num_queries for layout in layouts)
    return FixedQueries(tuple(wanted), queries, _ratio(model, routings, queries))


def set_dynamic_queries(model: nn.Module) -> None:
    """Let the routers choose again, as many queries as each image needs.

    Args:
        model: With routed blocks; changed in place.

    Raises:
        ValueError: It has none.
    """
    require_routers(model)
    for block in routed_blocks(model):
        block.fixed_layout = None


def mean_counts(model: nn.Module, loader: Iterable[Any]) -> tuple[Counts, ...]:
    """How many regions of an image get each split on average: what dynamic routing spends, for fixed shapes.

    Args:
        model: With routed blocks and dynamic queries. Its training modes are kept.
        loader: As in :func:`set_budget`, read once; all images of one size.

    Returns:
        Per routed block, the mean counts rounded to whole regions, finest first.

    Raises:
        TypeError: The loader yields something else than images.
        ValueError: No images, no routers, or fixed queries.
    """
    require_routers(model)
    refuse_fixed(model)
    seen = observe(model, loader)
    return tuple(_rounded((counts / seen.images).tolist()) for counts in seen.choices)


def _rounded(shares: list[float]) -> Counts:
    """Whole numbers with the same sum, the largest remainders rounded up."""
    whole = [int(share) for share in shares]
    missing = round(sum(shares)) - sum(whole)
    by_remainder = sorted(range(len(shares)), key=lambda index: whole[index] - shares[index])
    for index in by_remainder[:missing]:
        whole[index] += 1
    return tuple(whole)


def _dynamic_routings(model: Any, image_size: tuple[int, int] | None) -> list[Routing]:
    """One empty image's routings, for the grids of all layers."""
    weight = next(module.weight for module in model.modules() if isinstance(module, nn.Conv2d))
    size = image_size if image_size is not None else _input_size(model)
    image = torch.zeros(1, weight.shape[1], *size, device=weight.device, dtype=weight.dtype)
    with evaluating(model), torch.no_grad():
        routings: list[Routing] = model.forward_routed(image)[1]
    return routings


def _input_size(model: Any) -> tuple[int, int]:
    """(H, W) in pixels, where timm's models and this package's keep it."""
    size = getattr(model, "img_size", None) or model.patch_embed.img_size
    if size is None:
        raise ValueError("image_size: got None; expected (H, W), this model takes any size")
    return size[0], size[1]


def _wanted_counts(model: nn.Module, ratio_or_counts: Any, routings: Sequence[Routing]) -> list[Counts]:
    if isinstance(ratio_or_counts, (int, float)):
        return _affordable(model, routings, check_target("ratio_or_counts", ratio_or_counts))
    return _per_layer(ratio_or_counts, len(routings))


def _layouts(model: nn.Module, routings: Sequence[Routing], wanted: Sequence[Counts]) -> list[FixedLayout]:
    layouts = []
    for index, (block, routing, counts) in enumerate(zip(routed_blocks(model), routings, wanted, strict=True)):
        device = block.router.gate.weight.device
        try:
            layouts.append(FixedLayout(counts, routing.grid, routing.splits, routing.num_prefix_tokens, device))
        except ValueError as error:
            raise ValueError(f"ratio_or_counts, routed layer {index}: {error}") from None
    return layouts


def _per_layer(counts: Any, layers: int) -> list[Counts]:
    """One tuple of counts per layer, from one for all or one for each."""
    rows = [counts] * layers if all(isinstance(count, int) for count in counts) else list(counts)
    if len(rows) != layers:
        raise ValueError(
            f"ratio_or_counts: got {len(rows)} tuples of counts; expected one, or one per routed layer, {layers}"
        )
    return [tuple(row) for row in rows]


def _affordable(model: nn.Module, routings: Sequence[Routing], ratio: float) -> list[Counts]:
    """The counts of the largest share of each layer's range that stays within a MAC ratio."""

    def counts_at(share: float) -> list[Counts]:
        return [_spend(routing, share) for routing in routings]

    def cost(counts: list[Counts]) -> float:
        queries = [
            FixedLayout(count, routing.grid, routing.splits, routing.num_prefix_tokens).num_queries
            for count, routing in zip(counts, routings, strict=True)
        ]
        return _ratio(model, routings, queries)

    cheapest = cost(counts_at(0.0))
    if ratio < cheapest - 1e-6:
        raise ValueError(
            f"ratio_or_counts: got a MAC ratio of {ratio}; expected one from {cheapest:.4f}, every region at its "
            "coarsest split, to 1"
        )
    low, high = 0.0, 1.0
    if cost(counts_at(1.0)) <= ratio + 1e-9:
        return counts_at(1.0)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(counts_at(middle)) <= ratio + 1e-9 else (low, middle)
    return counts_at(low)


def _spend(routing: Routing, share: float) -> Counts:
    """Counts that spend a share of what refining every region would cost: finest splits first."""
    rows, cols = region_grid(routing.grid, routing.splits)
    prices = [k * k - routing.splits[-1] ** 2 for k in routing.splits]
    budget, left, counts = share * rows * cols * prices[0] + 1e-6, rows * cols, []
    for price in prices[:-1]:
        count = min(left, int(budget // price))
        counts.append(count)
        budget, left = budget - count * price, left - count
    return (*counts, left)


def _ratio(model: nn.Module, routings: Sequence[Routing], queries: Sequence[int]) -> float:
    macs, layers = routed_macs(model, routings)
    spent = sum(layer.per_query * (layer.num_tokens - count) for layer, count in zip(layers, queries, strict=True))
    return 1 - spent / macs.static
