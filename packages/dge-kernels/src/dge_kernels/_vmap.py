"""Rules for torch.func.vmap: the mapped dimension becomes more channels, heads or images of one call.

torch.func's own derivatives (grad, jvp and what is built on them) do not reach operators registered as these are;
:func:`refuse_derivatives` says so, where torch would fail with other words or return a zero tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["refuse_derivatives", "register"]

_ops = torch.ops.dge_kernels
_Dims = Sequence[int | None]


def refuse_derivatives(name: str, *tensors: Tensor) -> None:
    """Raise where torch.func or forward-mode differentiation is at work on the tensors.

    Raises:
        RuntimeError: The message names the function and what to use instead.
    """
    if torch.compiler.is_compiling():
        return
    forward = forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if not forward and torch._C._are_functorch_transforms_active():
        stack = torch._C._functorch.get_interpreter_stack() or []
        forward = any(str(level.key()) in ("TransformType.Grad", "TransformType.Jvp") for level in stack)
    if forward:
        raise RuntimeError(
            f"dge_kernels.{name} is differentiable by torch.autograd only, not by torch.func (grad, jvp, ...) nor in "
            f"forward mode; dge_kernels.reference.{name} is"
        )


def _refuse_mapped(dims: _Dims, what: str) -> None:
    if any(dim is not None for dim in dims):
        raise RuntimeError(
            f"{what} cannot be mapped by torch.func.vmap: each element would have its own number of queries; "
            "plan all images as one batch instead"
        )


def _fold(tensor: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """The mapped dimension, of `size`, as the outer part of dimension `axis` of the unmapped tensor."""
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.movedim(0, axis).flatten(axis, axis + 1)


def _fold_channels(operator: Callable[..., Tensor], data: tuple[int, ...]) -> Callable[..., tuple[Tensor, int]]:
    """A rule for an operator whose arguments `data` end in channels, and that treats channels alike."""

    def rule(info: Any, dims: _Dims, *arguments: Any) -> tuple[Tensor, int]:
        _refuse_mapped([dim for i, dim in enumerate(dims) if i not in data], "the patches of a QueryPlan")
        size = info.batch_size
        folded = list(arguments)
        for i in data:
            axis = arguments[i].dim() - 1 - (dims[i] is not None)
            folded[i] = _fold(arguments[i], dims[i], size, axis)
        out = operator(*folded)
        return out.unflatten(-1, (size, -1)), out.dim() - 1

    return rule


def _fold_heads(operator: Callable[..., Any], kinds: str, results: str) -> Callable[..., tuple[Any, Any]]:
    """A rule for an attention operator; the letters say which arguments and results have heads, and after what.

    A q has them after the queries, a k after the keys, packed or of each image; a dot stands for no heads.
    """

    def rule(info: Any, dims: _Dims, *arguments: Any) -> tuple[Any, Any]:
        _refuse_mapped([dim for dim, kind in zip(dims, kinds, strict=False) if kind == "."], "cu_seqlens")
        size, first = info.batch_size, kinds.index("k")
        rank = arguments[first].dim() - (dims[first] is not None)
        heads = {"q": 1, "k": rank - 2}
        folded = [
            argument if kind == "." or argument is None else _fold(argument, dim, size, heads[kind])
            for argument, dim, kind in zip(arguments, dims, kinds, strict=False)
        ]
        biased = len(folded) == len(kinds) and folded[-1] is not None
        # Without a bias the last gradient is empty.
        axes = [None if kind == "b" and not biased else heads["k" if kind == "b" else kind] for kind in results]
        out = [
            result if axis is None else result.unflatten(axis, (size, -1))
            for result, axis in zip(operator(*folded), axes, strict=True)
        ]
        return tuple(out), tuple(axes)

    return rule


def _route(info: Any, dims: _Dims, x: Tensor, weight: Tensor, bias: Tensor, *geometry: int) -> tuple[Tensor, int]:
    size = info.batch_size
    if dims[1] is None and dims[2] is None:
        return _ops.route(_fold(x, dims[0], size, 0), weight, bias, *geometry).unflatten(0, (size, -1)), 0
    x, weight, bias = (
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((x, weight, bias), dims, strict=False)
    )
    each = [_ops.route(*element, *geometry) for element in zip(x, weight, bias, strict=True)]
    return torch.stack(each), 0


def _refuse_plan(info: Any, dims: _Dims, *arguments: Any) -> None:
    _refuse_mapped(dims, "plan_queries")


def register() -> None:
    """Register every rule; once, after the library's schemas are loaded."""
    add = torch.library.register_vmap
    for name in ("plan_queries", "count_queries", "write_patches"):
        add(f"dge_kernels::{name}", _refuse_plan)
    for name in ("pool_queries", "pool_queries_backward", "unpool_queries_backward"):
        add(f"dge_kernels::{name}", _fold_channels(getattr(_ops, name), (0,)))
    add("dge_kernels::unpool_queries", _fold_channels(_ops.unpool_queries, (0, 2)))
    add("dge_kernels::ragged_attention", _fold_heads(_ops.ragged_attention, "qkk....k", "qq"))
    add("dge_kernels::ragged_attention_backward", _fold_heads(_ops.ragged_attention_backward, "qqkkqq....k", "qkkb"))
    add("dge_kernels::route", _route)
