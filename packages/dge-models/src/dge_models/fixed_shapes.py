"""Static shapes for export, whichever way a model is cheaper: counts that some pictures decide."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dge_models.budget import check_target
from dge_models.calibration import set_budget
from dge_models.finding import routed_models
from dge_models.macs import count_macs
from dge_models.merge_tokens import set_merge_counts
from dge_models.merged import MergedTransformer
from dge_models.merging_trace import find_merged, trace_merging
from dge_models.projections import placement
from dge_models.routed import routed_blocks
from dge_models.routing_stats import pixels_of, refuse_iterator
from dge_models.static_queries import mean_counts, set_dynamic_queries, set_fixed_queries

__all__ = ["FixedShapes", "fix_shapes"]


@dataclass(frozen=True)
class FixedShapes:
    """What every image costs in a model of static shapes.

    Attributes:
        kind: What makes it cheaper: "routing", "merging", or nothing, "dense".
        counts: Per routed block, how many regions get each split, finest first; per merging block, one number, the
            groups that merge; empty of a dense model.
        ratio: MACs of an image, relative to those with every token and query computed.
    """

    kind: Literal["dense", "merging", "routing"]
    counts: tuple[tuple[int, ...], ...]
    ratio: float


def fix_shapes(model: nn.Module, loader: Iterable[Any], ratio: float | None = None) -> FixedShapes:
    """Have a model spend the same on every image, what it spends on some pictures on average.

    A routed model gets fixed queries, :func:`mean_counts` of the pictures. A merging model gets constant counts, the
    mean of what its thresholds merge. Counts are rounded to whole regions and tokens.

    Args:
        model: With routed blocks, from :func:`merge_tokens`, or plain; changed in place.
        loader: Batches of images [B, C, H, W], or sequences that start with one, all of one size; read several times,
            so no iterator. A few hundred images of the kind that the model will see are enough.
        ratio: Mean MAC ratio to set before, as :func:`set_budget` does; None keeps what the model spends now, and
            counts that are constant already.

    Returns:
        The counts and what they cost.

    Raises:
        TypeError: The loader is an iterator or yields something else than images.
        ValueError: `ratio` is out of the model's reach, a plain model is asked for less than ratio 1, or there are no
            images.
    """
    if ratio is not None:
        check_target("ratio", ratio)
    refuse_iterator(loader)
    images = next((pixels for pixels in map(pixels_of, loader) if len(pixels)), None)
    if images is None:
        raise ValueError("loader: got no images; expected at least one batch")
    merged = find_merged(model)
    kind: Literal["dense", "merging", "routing"] = "dense"
    counts: tuple[tuple[int, ...], ...] = ()
    if merged is not None:
        kind, counts = "merging", _fix_merging(merged, loader, ratio)
    elif routed_models(model):
        height, width = images.shape[-2:]
        kind, counts = "routing", _fix_routing(model, loader, ratio, (height, width))
    elif ratio is not None and ratio < 1:
        raise ValueError(
            f"ratio: got {ratio} for a {type(model).__name__} that neither routes nor merges; expected 1, or a model "
            "from from_timm and fit_routers, or from merge_tokens"
        )
    if kind == "dense":  # of any family, even one whose MACs are not known
        return FixedShapes(kind, counts, 1.0)
    macs = count_macs(model, images[:1].to(placement(model)[0]))
    return FixedShapes(kind, counts, float(macs.total.mean()) / macs.static_total)


def _fix_routing(
    model: nn.Module, loader: Iterable[Any], ratio: float | None, image_size: tuple[int, int]
) -> tuple[tuple[int, ...], ...]:
    layouts = [block.fixed_layout for block in routed_blocks(model) if block.fixed_layout is not None]
    if ratio is None and layouts:
        return tuple(layout.counts for layout in layouts)
    set_dynamic_queries(model)
    if ratio is not None:
        set_budget(model, ratio, loader)
    return set_fixed_queries(model, mean_counts(model, loader), image_size=image_size).counts


def _fix_merging(model: MergedTransformer, loader: Iterable[Any], ratio: float | None) -> tuple[tuple[int, ...], ...]:
    if ratio is not None:
        set_budget(model, ratio, loader)
    if not model.even:
        set_merge_counts(model, _mean_merges(model, loader))
    return tuple((block.count or 0,) for block in model.blocks)


def _mean_merges(model: MergedTransformer, loader: Iterable[Any]) -> list[int]:
    """How many groups of an image merge in each block on average; at most half of those of the grid that are left."""
    device = placement(model)[0]
    traces = [trace_merging(model, pixels.to(device)) for pixels in map(pixels_of, loader) if len(pixels)]
    left = torch.cat([trace.groups for trace in traces], 1).double().mean(1)
    rows, cols = traces[0].grid
    tokens = rows * cols
    counts: list[int] = []
    for mean in (left - model.num_prefix_tokens).tolist():
        remaining = tokens - sum(counts)
        counts.append(min(max(round(remaining - mean), 0), remaining // 2))
    return counts
