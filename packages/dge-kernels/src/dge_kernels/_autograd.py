"""Autograd formulas. Each backward is an operator of its own; differentiating one again is refused."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = ["register"]

_ops = torch.ops.dge_kernels


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, patches, *ctx.geometry = inputs
    ctx.batch = x.shape[0]
    ctx.save_for_backward(patches)


def _pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (patches,) = ctx.saved_tensors
    return _ops.pool_queries_backward(grad, patches, ctx.batch, *ctx.geometry), None, None, None, None


def _save_unpool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, patches, _, *ctx.geometry = inputs
    ctx.save_for_backward(patches)


def _unpool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (patches,) = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    delta = _ops.unpool_queries_backward(grad, patches, *ctx.geometry) if wanted else None
    return delta, None, grad, None, None, None


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen, ctx.scale, cu_seqlens_k, bias = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k, bias)


def _attention_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *saved, cu_seqlens, cu_seqlens_k, bias = ctx.saved_tensors
    options = (cu_seqlens, ctx.max_seqlen, ctx.scale, cu_seqlens_k, bias)
    *grads, grad_bias = _ops.ragged_attention_backward(grad, *saved, *options)
    return *grads, None, None, None, None, None if bias is None else grad_bias


def _refuse(name: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"dge_kernels.{name} cannot be differentiated twice; "
            f"for second derivatives use dge_kernels.reference.{name}"
        )

    return backward


def register() -> None:
    """Register every formula; once, after the library's schemas are loaded."""
    add = torch.library.register_autograd
    add("dge_kernels::pool_queries", _pool_backward, setup_context=_save_pool)
    add("dge_kernels::unpool_queries", _unpool_backward, setup_context=_save_unpool)
    add("dge_kernels::ragged_attention", _attention_backward, setup_context=_save_attention)
    for name in ("pool_queries", "unpool_queries", "ragged_attention"):
        add(f"dge_kernels::{name}_backward", _refuse(name))
