"""The dense training mode: queries of every split at once, recombined by the gates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dge_models.routing import Routing, patch_sides

__all__ = ["coarse_differences", "every_patch", "nested_means", "patch_index"]
__all__ += ["pool_coarse_splits", "pool_every_split", "recombine"]


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


def nested_means(x: Tensor, grid: tuple[int, int], num_prefix_tokens: int, sides: Sequence[int]) -> list[Tensor]:
    """Means of whole patches, those of large patches from those of small ones.

    Means along one axis at a time keep channels together, where pooling wants a layout of its own. Those of whole rows
    come first, long runs of memory that become half as many or fewer.

    Args:
        x: [B, T + H·W, C] tokens, prefix tokens first; any floating dtype.
        grid: (H, W), of which every side is a divisor.
        num_prefix_tokens: T.
        sides: p, of patches in tokens, in ascending order.

    Returns:
        Per side, float32 [B, H/p, W/p, C] (float64 for a float64 input).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    maps = {1: torch.unflatten(x[:, num_prefix_tokens:], 1, grid)}
    for side in sides:
        below = max(small for small in maps if side % small == 0)
        means, times = maps[below], side // below
        if times > 1:
            columns = means.shape[2]
            means = torch.unflatten(means.flatten(2), 1, (-1, times)).mean(2, dtype=wide)
            means = torch.unflatten(means, 2, (columns // times, times, -1)).mean(3)
        maps[side] = means.to(wide)
    return [maps[side] for side in sides]


def every_patch(grid: tuple[int, int], num_prefix_tokens: int, splits: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the queries of :func:`pool_every_split` are.

    Args:
        grid: (H, W).
        num_prefix_tokens: T.
        splits: Queries per region side, finest first.
        device: Of the result.

    Returns:
        int64 [T + Σ ⌈H/p⌉·⌈W/p⌉, 3]: row, column and side of each query's patch in tokens, as the last three columns of
        ``QueryPlan.patches``; prefix token t has row −t − 1, column 0 and side 1.
    """
    prefix = torch.arange(num_prefix_tokens, device=device)
    parts = [torch.stack([-prefix - 1, torch.zeros_like(prefix), torch.ones_like(prefix)], dim=1)]
    for side in patch_sides(splits):
        rows, cols = (torch.arange(0, length, side, device=device) for length in grid)
        parts.append(torch.cartesian_prod(rows, cols, torch.tensor([side], device=device)))
    return torch.cat(parts)


def patch_index(patches: Tensor, grid: tuple[int, int], num_prefix_tokens: int, splits: tuple[int, ...]) -> Tensor:
    """Rows of :func:`every_patch`, whose inverse this is.

    Args:
        patches: Integer [..., 3], some of its rows.
        grid: (H, W).
        num_prefix_tokens: T.
        splits: Queries per region side, finest first.

    Returns:
        int64 [...].
    """
    row, col, side = patches.long().unbind(-1)
    index, start = -row - 1, num_prefix_tokens
    for size in patch_sides(splits):
        rows, cols = (-(-length // size) for length in grid)
        of_size = (row >= 0) & (side == size)
        index = torch.where(of_size, start + row // size * cols + col // size, index)
        start += rows * cols
    return index


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


def coarse_differences(
    delta: Tensor, grid: tuple[int, int], num_prefix_tokens: int, splits: tuple[int, ...]
) -> list[Tensor]:
    """What every token gets from each split, less what the next finer split gives it.

    Args:
        delta: [B, T + Σ ⌈H/p⌉·⌈W/p⌉, C], the change of each query of :func:`pool_every_split`.
        grid: (H, W).
        num_prefix_tokens: T.
        splits: Queries per region side, finest first.

    Returns:
        [B, H, W, C] per split but the finest.
    """
    sides = patch_sides(splits)
    shapes = [(-(-grid[0] // side), -(-grid[1] // side)) for side in sides]
    _, *parts = delta.split_with_sizes([num_prefix_tokens, *(rows * cols for rows, cols in shapes)], dim=1)
    changes = [
        _spread(torch.unflatten(part, 1, shape), side, grid)
        for part, side, shape in zip(parts, sides, shapes, strict=True)
    ]
    return [coarse - fine for fine, coarse in pairwise(changes)]
