"""Every operator of the package in plain PyTorch.

This is the definition: the compiled kernels are tested against it. It runs on any device that PyTorch has,
needs no compiled library, and differentiates through autograd, twice if asked to. It checks nothing and
does not try to be fast.

Source: Song et al., "Dynamic Grained Encoder for Vision Transformers", NeurIPS 2021, section 3; grids that
the region does not divide are clipped at the bottom and right edge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dge_kernels.plan import QueryPlan, region_grid, region_size

__all__ = ["plan_queries", "pool_queries", "ragged_attention", "route", "unpool_queries"]


def plan_queries(
    choice: Tensor,
    splits: tuple[int, ...] = (4, 2, 1),
    *,
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
) -> QueryPlan:
    """Definition of :func:`dge_kernels.plan_queries`."""
    size = region_size(splits)
    batch, region_rows, region_cols = choice.shape
    height, width = grid if grid is not None else (region_rows * size, region_cols * size)
    device = choice.device

    def axis(length: int) -> Tensor:
        return torch.arange(length, device=device)

    # One slot per query that a region could have; those beyond its split or outside the grid are dropped.
    slot = axis(size * size)
    per_side = torch.tensor(splits, device=device)[choice.long()].unsqueeze(-1)
    side = size // per_side
    y = axis(region_rows).view(1, -1, 1, 1) * size + slot // per_side * side
    x = axis(region_cols).view(1, 1, -1, 1) * size + slot % per_side * side
    kept = (slot < per_side * per_side) & (y < height) & (x < width)
    image = axis(batch).view(-1, 1, 1, 1).expand_as(y)
    spatial = torch.stack([image, y, x, side.expand_as(y)], dim=-1).flatten(1, 3)

    token = axis(num_prefix_tokens).expand(batch, -1)
    image = axis(batch).view(-1, 1).expand_as(token)
    prefix = torch.stack([image, -1 - token, torch.zeros_like(token), torch.ones_like(token)], dim=-1)

    kept = torch.cat([torch.ones_like(token, dtype=torch.bool), kept.flatten(1)], dim=1)
    lengths = kept.sum(1)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    cu_seqlens[1:] = lengths.cumsum(0)
    return QueryPlan(
        patches=torch.cat([prefix, spatial], dim=1)[kept].to(torch.int32),
        cu_seqlens=cu_seqlens,
        grid=(height, width),
        num_prefix_tokens=num_prefix_tokens,
        splits=splits,
        max_seqlen=int(lengths.max()) if batch else 0,
    )


def _pairs(plan: QueryPlan) -> tuple[Tensor, Tensor]:
    """Every (query, token) pair of a plan: int64 query rows and int64 rows of the flattened [B·N] tokens."""
    height, width = plan.grid
    image, y, x, side = plan.patches.long().unsqueeze(-1).unsqueeze(-1).unbind(1)
    offset = torch.arange(region_size(plan.splits), device=plan.device)
    row, col = offset.view(1, -1, 1), offset.view(1, 1, -1)
    inside = (row < side) & (col < side) & (y + row < height) & (x + col < width)
    token = torch.where(y < 0, -1 - y, plan.num_prefix_tokens + (y + row) * width + x + col)
    query = torch.arange(plan.total, device=plan.device).view(-1, 1, 1).expand_as(inside)
    return query[inside], (image * plan.num_tokens + token).expand_as(inside)[inside]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool_queries(x: Tensor, plan: QueryPlan) -> Tensor:
    """Definition of :func:`dge_kernels.pool_queries`."""
    query, token = _pairs(plan)
    wide = x.flatten(0, 1).to(_accumulator(x.dtype))
    total = wide.new_zeros(plan.total, x.shape[-1]).index_add(0, query, wide[token])
    count = wide.new_zeros(plan.total, 1).index_add(0, query, wide.new_ones(len(query), 1))
    return (total / count).to(x.dtype)


def unpool_queries(delta: Tensor, plan: QueryPlan, residual: Tensor) -> Tensor:
    """Definition of :func:`dge_kernels.unpool_queries`."""
    query, token = _pairs(plan)
    wide = residual.flatten(0, 1).to(_accumulator(residual.dtype))
    return wide.index_add(0, token, delta.to(wide.dtype)[query]).to(residual.dtype).view_as(residual)


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: QueryPlan | None = None,
    scale: float | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    bias: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Definition of :func:`dge_kernels.ragged_attention`, which needs no longest lengths."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    wide = _accumulator(q.dtype)
    ends = cu_seqlens_q if plan is None else plan.cu_seqlens
    if ends is None:
        raise ValueError("plan or cu_seqlens_q must say which queries are an image's, got neither")

    def images(keys: Tensor) -> tuple[Tensor, ...]:
        return tuple(keys) if cu_seqlens_k is None else keys.split(cu_seqlens_k.diff().tolist())

    biases = [None] * (ends.shape[0] - 1) if bias is None else images(bias.to(wide))
    outputs = []
    for queries, keys, values, offset in zip(q.split(ends.diff().tolist()), images(k), images(v), biases, strict=True):
        scores = torch.einsum("qhd,nhd->hqn", queries.to(wide), keys.to(wide)) * factor
        if offset is not None:
            scores = scores + (offset if offset.dim() == 2 else offset.unsqueeze(1)).t().unsqueeze(1)
        masked = (scores == -torch.inf).all(-1, keepdim=True)  # also where there is no key
        weights = scores.masked_fill(masked, 0).softmax(-1).masked_fill(masked, 0)
        outputs.append(torch.einsum("hqn,nhd->qhd", weights, values.to(wide)))
    return torch.cat(outputs).to(q.dtype) if outputs else q.clone()


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    splits: tuple[int, ...] = (4, 2, 1),
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Definition of :func:`dge_kernels.route`."""
    size, (rows, cols) = region_size(splits), region_grid(grid, splits)
    wide = _accumulator(x.dtype)
    tokens = x[:, num_prefix_tokens:].to(wide).unflatten(1, grid)
    y = torch.arange(grid[0], device=x.device) // size
    col = torch.arange(grid[1], device=x.device) // size
    region = (y.view(-1, 1) * cols + col).flatten()
    total = tokens.new_zeros(x.shape[0], rows * cols, x.shape[-1]).index_add(1, region, tokens.flatten(1, 2))
    count = region.bincount(minlength=rows * cols).to(wide).unsqueeze(-1)
    logits = torch.nn.functional.linear(total / count, weight.to(wide), None if bias is None else bias.to(wide))
    return logits.argmax(-1).to(torch.uint8).unflatten(1, (rows, cols))
