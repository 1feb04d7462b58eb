"""Checks of the public functions' arguments; every message names the argument, what came and what is expected."""

from __future__ import annotations

import torch
from torch import Tensor

from dge_kernels.plan import QueryPlan, region_grid

__all__ = ["check_attention", "check_choice", "check_grid", "check_pool", "check_route", "check_splits", "check_unpool"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_float(tensor: Tensor, name: str, layout: str) -> None:
    _check_tensor(tensor, name)
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} must be [{layout}], got shape {_shape(tensor)}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")


def _check_alike(tensor: Tensor, name: str, other: Tensor, other_name: str, *, dtype: bool = True) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")
    if dtype and tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")


def _check_plan(plan: QueryPlan, tensor: Tensor, name: str) -> None:
    if not isinstance(plan, QueryPlan):
        raise TypeError(f"plan must be a QueryPlan (from plan_queries), got {type(plan).__name__}")
    if plan.device != tensor.device:
        raise ValueError(f"plan must be on the device of {name}, {tensor.device}, got {plan.device}; see plan.to()")


def _is_count(value: object, least: int) -> bool:
    # A SymInt, which torch.compile passes for sizes, is not an int.
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) and value >= least


def check_grid(grid: tuple[int, int], num_prefix_tokens: int) -> None:
    """Refuse a grid that is not two positive integers, or a negative prefix."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(_is_count(side, 1) for side in grid):
        raise ValueError(f"grid must be (height, width) in tokens, both at least 1, got {grid!r}")
    if not _is_count(num_prefix_tokens, 0):
        raise ValueError(f"num_prefix_tokens must be an integer of at least 0, got {num_prefix_tokens!r}")


def check_splits(splits: tuple[int, ...]) -> None:
    """Refuse a split set that is empty, repeats itself or has a member that does not divide the largest."""
    if not isinstance(splits, (tuple, list)) or not splits or not all(_is_count(split, 1) for split in splits):
        raise ValueError(f"splits must be a tuple of integers of at least 1, such as (4, 2, 1), got {splits!r}")
    if len(set(splits)) != len(splits) or len(splits) > 256:
        raise ValueError(f"splits must be at most 256 different integers, got {splits!r}")
    if any(max(splits) % split for split in splits):
        raise ValueError(f"splits must each divide the largest, which is the region's side, got {splits!r}")


def check_choice(choice: Tensor, grid: tuple[int, int] | None, splits: tuple[int, ...]) -> None:
    """Refuse a choice that is no integer tensor of one entry per region."""
    _check_tensor(choice, "choice")
    if choice.dtype not in _INTEGERS:
        raise TypeError(f"choice must be uint8, int8, int16, int32 or int64, got {choice.dtype}")
    if choice.dim() != 3:
        raise ValueError(f"choice must be [B, rows of regions, columns of regions], got shape {_shape(choice)}")
    regions = tuple(choice.shape[1:]) if grid is None else region_grid(grid, splits)
    if tuple(choice.shape[1:]) != regions or 0 in regions:
        raise ValueError(
            f"choice must have one entry per region, [B, {regions[0]}, {regions[1]}] for grid {grid} "
            f"and regions of {max(splits)} x {max(splits)} tokens, got shape {_shape(choice)}"
        )


def check_pool(x: Tensor, plan: QueryPlan) -> None:
    """Refuse tokens that are not the plan's."""
    _check_float(x, "x", "B, N, C")
    _check_plan(plan, x, "x")
    if x.shape[0] != plan.batch_size or x.shape[1] != plan.num_tokens:
        raise ValueError(
            f"x must be [{plan.batch_size}, {plan.num_tokens}, C] for this plan (batch, "
            f"{plan.num_prefix_tokens} prefix tokens + grid {plan.grid}), got shape {_shape(x)}"
        )


def check_unpool(delta: Tensor, plan: QueryPlan, residual: Tensor) -> None:
    """Refuse queries or tokens that are not the plan's, or that do not fit each other."""
    _check_float(delta, "delta", "Q, C")
    _check_float(residual, "residual", "B, N, C")
    _check_plan(plan, residual, "residual")
    _check_alike(delta, "delta", residual, "residual")
    expected = [plan.batch_size, plan.num_tokens, delta.shape[1]]
    if delta.shape[0] != plan.total:
        raise ValueError(f"delta must have the plan's {plan.total} queries as rows, got shape {_shape(delta)}")
    if list(residual.shape) != expected:
        raise ValueError(f"residual must be {expected} for this plan and delta, got shape {_shape(residual)}")


def _check_ends(ends: Tensor, name: str, q: Tensor, batch: int | None) -> int:
    """The number of images; their values are the operators' to check."""
    _check_tensor(ends, name)
    _check_alike(ends, name, q, "q", dtype=False)
    if ends.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {ends.dtype}")
    if ends.dim() != 1 or ends.shape[0] < 1 or (batch is not None and ends.shape[0] != batch + 1):
        raise ValueError(f"{name} must be [{'B' if batch is None else batch} + 1], got shape {_shape(ends)}")
    return ends.shape[0] - 1


def _check_longest(value: int | None, name: str, ends: Tensor | None) -> None:
    if value is not None and ends is None:
        raise ValueError(f"{name} must be None without cu_seqlens_{name[-1]}, got {value!r}")
    if value is not None and not _is_count(value, 0):
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: QueryPlan | None,
    ends: tuple[Tensor | None, Tensor | None],
    longest: tuple[int | None, int | None],
    bias: Tensor | None,
) -> None:
    """Refuse queries that are not the plan's, or keys, values and a bias that do not fit them."""
    _check_float(q, "q", "Q, heads, head_dim")
    ends_q, ends_k = ends
    _check_longest(longest[0], "max_seqlen_q", ends_q)
    _check_longest(longest[1], "max_seqlen_k", ends_k)
    if ends_q is not None:
        if plan is not None:
            raise ValueError("plan and cu_seqlens_q both say which queries are an image's, expected one of them")
        batch = _check_ends(ends_q, "cu_seqlens_q", q, None)
    elif plan is None:
        raise ValueError("plan or cu_seqlens_q must say which queries are an image's, got neither")
    else:
        _check_plan(plan, q, "q")
        batch = plan.batch_size
        if q.shape[0] != plan.total:
            raise ValueError(f"q must have the plan's {plan.total} queries as rows, got shape {_shape(q)}")
    if ends_k is not None:
        _check_ends(ends_k, "cu_seqlens_k", q, batch)
    dense = ends_k is None
    for tensor, name in ((k, "k"), (v, "v")):
        _check_float(tensor, name, "B, N, heads, head_dim" if dense else "K, heads, head_dim")
        _check_alike(tensor, name, q, "q")
        rows = [batch, k.shape[1]] if dense else [k.shape[0]]
        if list(tensor.shape) != [*rows, *q.shape[1:]] or (dense and k.shape[1] < 1):
            wanted, one = (f"{batch}, N", "N >= 1") if dense else ("K", "K")
            raise ValueError(
                f"{name} must be [{wanted}, {q.shape[1]}, {q.shape[2]}] with one {one} for k and v, "
                f"got shape {_shape(tensor)}"
            )
    if bias is not None:
        _check_tensor(bias, "bias")
        _check_alike(bias, "bias", q, "q", dtype=False)
        if bias.dtype not in _FLOATS:
            raise TypeError(f"bias must be float32, float64, float16 or bfloat16, got {bias.dtype}")
        if bias.shape not in (k.shape[:-1], k.shape[:-2]):
            raise ValueError(
                f"bias must be {list(k.shape[:-2])}, one number per key, or {list(k.shape[:-1])}, one per key and "
                f"head, got shape {_shape(bias)}"
            )


def check_route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    splits: tuple[int, ...],
    num_prefix_tokens: int,
) -> None:
    """Refuse tokens that do not fill the grid, or a router that does not fit them."""
    check_grid(grid, num_prefix_tokens)
    check_splits(splits)
    _check_float(x, "x", "B, N, C")
    tokens = num_prefix_tokens + grid[0] * grid[1]
    if x.shape[1] != tokens:
        raise ValueError(
            f"x must be [B, {tokens}, C] for {num_prefix_tokens} prefix tokens and grid {grid}, got shape {_shape(x)}"
        )
    _check_float(weight, "weight", "splits, C")
    _check_alike(weight, "weight", x, "x", dtype=False)
    if list(weight.shape) != [len(splits), x.shape[2]]:
        raise ValueError(f"weight must be [{len(splits)}, {x.shape[2]}] (splits, C), got shape {_shape(weight)}")
    if bias is not None:
        _check_float(bias, "bias", "splits")
        _check_alike(bias, "bias", x, "x", dtype=False)
        if list(bias.shape) != [len(splits)]:
            raise ValueError(f"bias must be [{len(splits)}], one entry per split, got shape {_shape(bias)}")
