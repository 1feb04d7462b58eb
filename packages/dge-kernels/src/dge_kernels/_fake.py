"""Fake kernels: the outputs' shapes, dtypes and devices, for torch.compile and torch.export.

Sizes are annotated as int, and are SymInt while torch traces.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

__all__ = ["register"]


def _unknown_size(x: Tensor) -> torch.SymInt:
    """A size that depends on values.

    The context's ``new_dynamic_size`` breaks the graph of a plain ``torch.compile(model)``, which allows such sizes
    with ``fullgraph=True`` alone. What it would allocate breaks nothing.
    """
    shapes = getattr(getattr(x, "fake_mode", None), "shape_env", None)
    return torch.library.get_ctx().new_dynamic_size() if shapes is None else allocate_size(shapes)


def _plan_queries(
    choice: Tensor, splits: list[int], height: int, width: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor, torch.SymInt]:
    total, longest = _unknown_size(choice), _unknown_size(choice)
    patches = choice.new_empty((total, 4), dtype=torch.int32)
    return patches, choice.new_empty(choice.shape[0] + 1, dtype=torch.int32), longest


def _count_queries(
    choice: Tensor, splits: list[int], height: int, width: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    sums = choice.new_empty(choice.numel(), dtype=torch.int64)
    return sums, choice.new_empty(choice.shape[0] + 1, dtype=torch.int32)


def _write_patches(
    choice: Tensor, sums: Tensor, splits: list[int], height: int, width: int, num_prefix_tokens: int, total: int
) -> Tensor:
    return choice.new_empty((total, 4), dtype=torch.int32)


def _pool_queries(x: Tensor, patches: Tensor, height: int, width: int, num_prefix_tokens: int) -> Tensor:
    return x.new_empty(patches.shape[0], x.shape[2])


def _pool_queries_backward(
    grad: Tensor, patches: Tensor, batch: int, height: int, width: int, num_prefix_tokens: int
) -> Tensor:
    return grad.new_empty(batch, num_prefix_tokens + height * width, grad.shape[1])


def _unpool_queries(
    delta: Tensor, patches: Tensor, residual: Tensor, height: int, width: int, num_prefix_tokens: int
) -> Tensor:
    return residual.new_empty(residual.shape)


def _ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    cu_seqlens_k: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


def _ragged_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    cu_seqlens_k: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = logsumexp.new_empty(0 if bias is None else bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias


def _route(
    x: Tensor, weight: Tensor, bias: Tensor, region: int, height: int, width: int, num_prefix_tokens: int
) -> Tensor:
    rows, cols = (height + region - 1) // region, (width + region - 1) // region
    return x.new_empty((x.shape[0], rows, cols), dtype=torch.uint8)


def register() -> None:
    """Register every fake kernel; once, after the library's schemas are loaded."""
    kernels: dict[str, Callable[..., object]] = {
        "plan_queries": _plan_queries,
        "count_queries": _count_queries,
        "write_patches": _write_patches,
        "pool_queries": _pool_queries,
        "pool_queries_backward": _pool_queries_backward,
        "unpool_queries": _unpool_queries,
        "unpool_queries_backward": _pool_queries,
        "ragged_attention": _ragged_attention,
        "ragged_attention_backward": _ragged_attention_backward,
        "route": _route,
    }
    for name, kernel in kernels.items():
        torch.library.register_fake(f"dge_kernels::{name}", kernel)
