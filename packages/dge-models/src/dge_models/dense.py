"""The dense training mode: queries of every split at once, recombined by the gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dge_models.routing import Routing, patch_sides

__all__ = ["pool_coarse_splits", "pool_every_split", "recombine"]


def pool_coarse_splits(x: Tensor, grid: tuple[int, int], num_prefix_tokens: int, splits: tuple[int, ...]) -> Tensor:
    """The queries of all splits but the finest for all regions.

    Args:
        x: [B, T + H·W, C] tokens, prefix tokens first.
        grid: (H, W).
        num_prefix_tokens: T.
        splits: Queries per region side, finest first.

    Returns:
        [B, Σ ⌈H/p⌉·⌈W/p⌉, C] over the patch sides p > 1: the whole grid at each split, row by row.
    """
    spatial = torch.unflatten(x[:, num_prefix_tokens:], 1, grid).permute(0, 3, 1, 2)
    spatial = spatial.contiguous(memory_format=torch.channels_last)
    pooled = [
        F.avg_pool2d(spatial, side, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)
        for side in patch_sides(splits)[1:]
    ]
    return torch.cat(pooled, dim=1) if pooled else x[:, :0]


def pool_every_split(x: Tensor, grid: tuple[int, int], num_prefix_tokens: int, splits: tuple[int, ...]) -> Tensor:
    """The queries of all splits for all regions.

    Takes what :func:`pool_coarse_splits` takes.

    Returns:
        [B, T + Σ ⌈H/p⌉·⌈W/p⌉, C] over the patch sides p: the tokens themselves, which are the prefix tokens and the
        finest split's queries, and then the other splits'.
    """
    return torch.cat([x, pool_coarse_splits(x, grid, num_prefix_tokens, splits)], dim=1)


def _spread(x: Tensor, times: int, size: tuple[int, int]) -> Tensor:
    """Nearest upsampling of [B, h, w, C] by `times`, cropped to `size`."""
    if times > 1:
        x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=times, mode="nearest").permute(0, 2, 3, 1)
    return x[:, : size[0], : size[1]]


def recombine(x: Tensor, delta: Tensor, routing: Routing) -> Tensor:
    """Add the gated changes of all splits: x + Σₖ gateₖ · broadcastₖ(Δₖ), and the prefix tokens' once.

    Args:
        x: [B, T + H·W, C] tokens.
        delta: [B, T + Σ ⌈H/p⌉·⌈W/p⌉, C], the change of each query of :func:`pool_every_split`.
        routing: The layer's routing; every gate gets a gradient.

    Returns:
        [B, T + H·W, C].
    """
    grid, prefix = routing.grid, routing.num_prefix_tokens
    sides = patch_sides(routing.splits)
    shapes = [(-(-grid[0] // side), -(-grid[1] // side)) for side in sides]
    change, *parts = delta.split_with_sizes([prefix, *(rows * cols for rows, cols in shapes)], dim=1)
    gates = routing.gate.to(delta.dtype).split(1, dim=-1)
    total = torch.unflatten(x[:, prefix:], 1, grid)
    # Coarse to fine: where patches nest, a coarse change is spread on the next finer grid first, which is smaller.
    carried: Tensor | None = None
    carried_side = 0
    for part, gate, k, side, shape in reversed(list(zip(parts, gates, routing.splits, sides, shapes, strict=True))):
        spread_gate, part = _spread(gate, k, shape), torch.unflatten(part, 1, shape)
        if carried is not None and carried_side % side:
            total = total + _spread(carried, carried_side, grid)
            carried = None
        below = None if carried is None else _spread(carried, carried_side // side, shape)
        carried = part * spread_gate if below is None else torch.addcmul(below, part, spread_gate)
        carried_side = side
    if carried is not None:
        total = total + carried
    return torch.cat([x[:, :prefix] + change, total.flatten(1, 2)], dim=1)
