"""Floating-point operations for torch.utils.flop_counter, counted as it counts dense attention and linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["register"]

_ops = torch.ops.dge_kernels


def _product(q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> int:
    """Of one product of queries with their keys; where lengths are unknown, as if all images had the same."""
    queries, heads, width = q.shape
    if cu_seqlens_k is None:
        pairs = queries * k.shape[1]
    elif cu_seqlens.is_meta or type(cu_seqlens) is not Tensor:  # a tracer's tensor has no values
        pairs = queries * k.shape[0] // max(1, cu_seqlens.shape[0] - 1)
    else:
        pairs = int((cu_seqlens.diff().long() * cu_seqlens_k.diff().long()).sum())
    return 2 * pairs * heads * width


def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *options: Any, **results: Any) -> int:
    cu_seqlens_k = options[2] if len(options) > 2 else None
    return 2 * _product(q, k, cu_seqlens, cu_seqlens_k)  # scores, and their products with the values


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any, **results: Any) -> int:
    cu_seqlens_k = options[5] if len(options) > 5 else None
    # The scores again; the gradients of probabilities and values; those of queries and keys.
    return 5 * _product(q, k, options[2], cu_seqlens_k)


def _route(x: Tensor, weight: Tensor, *options: Any, out_val: Tensor) -> int:
    return 2 * out_val.numel() * weight.numel()


def register() -> None:
    """Register every formula; once, after the library's schemas are loaded. torch's varlen has its own."""
    register_flop_formula(_ops.ragged_attention, get_raw=True)(_attention)
    register_flop_formula(_ops.ragged_attention_backward, get_raw=True)(_attention_backward)
    register_flop_formula(_ops.route, get_raw=True)(_route)
