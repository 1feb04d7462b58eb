"""Static shapes from the weights of a dynamic model: a fixed number of queries per image in every routed layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from dge_models.budget import check_target, routed_macs
from dge_models.families import family_of
from dge_models.finding import find_routed
from dge_models.projections import placement
from dge_models.routed import routed_blocks
from dge_models.routing import Routing, region_grid
from dge_models.routing_stats import observe, refuse_fixed
from dge_models.static_layout import FixedLayout, fixed_queries

__all__ = ["FixedQueries", "empty_routings", "mac_ratio_of", "mean_counts", "set_dynamic_queries", "set_fixed_queries"]

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
    multiple: int = 1,
) -> FixedQueries:
    """Compute the same number of queries for every image in evaluation, those regions first that gain most.

    All shapes are then static and all operators plain PyTorch, for CUDA graphs, ONNX and TensorRT. Weights are
    not touched, training stays dynamic, and :func:`set_dynamic_queries` ends it. :func:`save_pretrained` stores it;
    files of weights alone do not: set it again after loading one.

    Args:
        model: With routed blocks; changed in place.
        ratio_or_counts: A MAC ratio in (0, 1] not to exceed: every layer then gives its finest split to as many
            regions as it can afford at one share of its range, what is left buys the next splits. Or how many
            regions of an image get each split, finest first: one tuple for all routed layers, or one for each,
            for example from :func:`mean_counts`.
        image_size: (H, W) in pixels of the images to come; None means the model's own input size.
        multiple: With a ratio: every layer's number of queries, prefix tokens included, is a multiple of this one, such
            as 8 for matrix units. It is rounded down, and up only where a layer has no smaller one.

    Returns:
        What was set.

    Raises:
        ValueError: The model has no routers, a ratio is outside its range (the error says which), counts don't
            fit the regions, or `multiple` is no positive integer, is given with counts, or is one that no number of
            queries of a layer has.
    """
    if type(multiple) is not int or multiple < 1:
        raise ValueError(f"multiple: got {multiple!r}; expected a positive integer, such as 8")
    model = find_routed(model)
    blocks = routed_blocks(model)
    routings = empty_routings(model, image_size)
    wanted = _wanted_counts(model, ratio_or_counts, routings, multiple)
    layouts = _layouts(model, routings, wanted)
    for block, fresh in zip(blocks, layouts, strict=True):
        block.fixed_layout = fresh
    queries = tuple(layout.num_queries for layout in layouts)
    return FixedQueries(tuple(wanted), queries, mac_ratio_of(model, routings, queries))


def set_dynamic_queries(model: nn.Module) -> None:
    """Let the routers choose again, as many queries as each image needs.

    Args:
        model: With routed blocks; changed in place.

    Raises:
        ValueError: It has none.
    """
    model = find_routed(model)
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
    model = find_routed(model)
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


def empty_routings(model: Any, image_size: tuple[int, int] | None = None) -> list[Routing]:
    """The routings of one image without their values, for the grids of all layers; nothing is computed.

    Args:
        model: With routed blocks, on any device.
        image_size: (H, W) in pixels; None means the model's own input size.

    Returns:
        One per routed block in network order, with tensors on the meta device.

    Raises:
        ValueError: The model has no size of its own and none is given, or it takes no images of this size.
    """
    family = family_of(model)
    size = image_size if image_size is not None else family.input_size(model)
    if size is None:
        raise ValueError("image_size: got None; expected (H, W), this model takes any size")
    return [
        _empty_routing(grid, prefix, block.router.splits)
        for (grid, prefix), block in zip(family.routed_places(model, size), routed_blocks(model), strict=True)
    ]


def _empty_routing(grid: tuple[int, int], num_prefix_tokens: int, splits: tuple[int, ...]) -> Routing:
    shape = (1, *region_grid(grid, splits))
    choice = torch.empty(shape, dtype=torch.uint8, device="meta")
    gate = torch.empty(*shape, len(splits), device="meta")
    return Routing(choice, gate, torch.empty(1, device="meta"), grid, num_prefix_tokens, splits)


def _wanted_counts(model: nn.Module, ratio_or_counts: Any, routings: Sequence[Routing], multiple: int) -> list[Counts]:
    if isinstance(ratio_or_counts, (int, float)):
        return _affordable(model, routings, check_target("ratio_or_counts", ratio_or_counts), multiple)
    if multiple != 1:
        raise ValueError(f"multiple: got {multiple} with counts; expected 1, only a ratio leaves room to round")
    return _per_layer(ratio_or_counts, len(routings))


def _layouts(model: nn.Module, routings: Sequence[Routing], wanted: Sequence[Counts]) -> list[FixedLayout]:
    layouts = []
    for index, (block, routing, counts) in enumerate(zip(routed_blocks(model), routings, wanted, strict=True)):
        device = placement(block)[0]
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


def _affordable(model: nn.Module, routings: Sequence[Routing], ratio: float, multiple: int) -> list[Counts]:
    """The counts of the largest share of each layer's range that stays within a MAC ratio."""

    def counts_at(share: float) -> list[Counts]:
        return [_spend(index, routing, share, multiple) for index, routing in enumerate(routings)]

    def cost(counts: list[Counts]) -> float:
        queries = [_queries(count, routing) for count, routing in zip(counts, routings, strict=True)]
        return mac_ratio_of(model, routings, queries)

    cheapest = cost(counts_at(0.0))
    if ratio < cheapest - 1e-6:
        rounded = "" if multiple == 1 else f", rounded to a multiple of {multiple} queries"
        raise ValueError(
            f"ratio_or_counts: got a MAC ratio of {ratio}; expected one from {cheapest:.4f}, every region at its "
            f"coarsest split{rounded}, to 1"
        )
    low, high = 0.0, 1.0
    if cost(counts_at(1.0)) <= ratio + 1e-9:
        return counts_at(1.0)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(counts_at(middle)) <= ratio + 1e-9 else (low, middle)
    return counts_at(low)


def _spend(index: int, routing: Routing, share: float, multiple: int) -> Counts:
    """Counts that spend a share of what refining every region would cost, finest splits first."""
    rows, cols = region_grid(routing.grid, routing.splits)
    prices = [k * k - routing.splits[-1] ** 2 for k in routing.splits]
    budget, left, counts = share * rows * cols * prices[0] + 1e-6, rows * cols, []
    for price in prices[:-1]:
        count = min(left, int(budget // price))
        counts.append(count)
        budget, left = budget - count * price, left - count
    return _rounded_queries(index, routing, (*counts, left), multiple)


def _rounded_queries(index: int, routing: Routing, counts: Counts, multiple: int) -> Counts:
    """The counts near these with the largest multiple of queries that is no larger, or else with the smallest."""
    most, regions = _queries(counts, routing), sum(counts)
    if most % multiple == 0:
        return counts
    # What is left of a number of queries after division repeats after that many regions.
    ranges = (range(max(0, count - multiple), min(regions, count + multiple) + 1) for count in counts[:-1])
    near = [(*few, regions - sum(few)) for few in product(*ranges) if sum(few) <= regions]
    found = [(queries, few) for few in near if (queries := _queries(few, routing)) % multiple == 0]
    if not found:
        raise ValueError(
            f"multiple: got {multiple}; routed layer {index} with splits {routing.splits} on a {routing.grid[0]} × "
            f"{routing.grid[1]} grid and {routing.num_prefix_tokens} prefix tokens has no such number of queries"
        )
    smaller = [pair for pair in found if pair[0] <= most]
    return max(smaller)[1] if smaller else min(found)[1]


def _queries(counts: Counts, routing: Routing) -> int:
    return fixed_queries(counts, routing.grid, routing.splits, routing.num_prefix_tokens)


def mac_ratio_of(model: nn.Module, routings: Sequence[Routing], queries: Sequence[int]) -> float:
    """The MAC ratio of these queries per image, one number per routed block."""
    macs, layers = routed_macs(model, routings)
    spent = sum(layer.per_query * (layer.num_tokens - count) for layer, count in zip(layers, queries, strict=True))
    return 1 - spent / macs.static
