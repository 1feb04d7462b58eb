"""The operators, checked and documented. Shapes: B images, N = T + H·W tokens each, Q queries in all, C channels,
h heads of d channels. All accept float32, float64, float16 and bfloat16, on the CPU and on CUDA, with any
strides; sums are accumulated in float32 (float64 for float64). All but :func:`route` and the plan are
differentiable once.

Source: Song et al., "Dynamic Grained Encoder for Vision Transformers", NeurIPS 2021, section 3.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from dge_kernels import _autocast, _checks, _library, _varlen, _vmap
from dge_kernels._future import HostCopy, QueryPlanFuture
from dge_kernels.plan import QueryPlan, region_size

__all__ = ["plan_queries", "plan_queries_async", "pool_queries", "ragged_attention", "route", "unpool_queries"]

_ops = torch.ops.dge_kernels
_CHECK_DEVICE_VALUES = os.environ.get("DGE_CHECK", "0") == "1"


def plan_queries(
    choice: Tensor,
    splits: tuple[int, ...] = (4, 2, 1),
    *,
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
) -> QueryPlan:
    """Lay out the queries that each region's chosen split asks for.

    A region of S × S tokens with split k is cut into k × k patches of S/k × S/k tokens, one query each. Regions
    and patches are clipped at the bottom and right edge of the grid; a patch with no token inside it yields none.

    Args:
        choice: Integer tensor [B, ⌈H/S⌉, ⌈W/S⌉], an index into `splits` for each region.
        splits: Queries per region side. Each divides the largest, S, which is the region's side in tokens.
        grid: (H, W) in tokens; by default whole regions, as many as `choice` has.
        num_prefix_tokens: Tokens per image in front of the grid; each is a query of its own.

    Returns:
        The plan, on the device of `choice`. On CUDA this waits for the device once, to learn how many
        queries there are.

    Raises:
        TypeError: `choice` is not an integer tensor.
        ValueError: `choice` has another shape or an entry outside [0, len(splits)), or `splits`, `grid` or
            `num_prefix_tokens` make no sense. On CUDA, entries out of range are clamped into it; with the
            environment variable DGE_CHECK=1 they raise there too, at the price of waiting for the device.

    Example:
        >>> import torch, dge_kernels
        >>> plan = dge_kernels.plan_queries(torch.tensor([[[0, 2]]]), splits=(2, 1, 4), num_prefix_tokens=1)
        >>> plan.total, plan.grid, plan.lengths.tolist()
        (21, (4, 8), [21])
        >>> plan.patches[:3].tolist()
        [[0, -1, 0, 1], [0, 0, 0, 2], [0, 0, 2, 2]]
    """
    arguments = _plan_arguments(choice, splits, grid, num_prefix_tokens)
    patches, cu_seqlens, longest = _call_plan(_ops.plan_queries, *arguments)
    return _plan(patches, cu_seqlens, longest, arguments)


def plan_queries_async(
    choice: Tensor,
    splits: tuple[int, ...] = (4, 2, 1),
    *,
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
) -> QueryPlanFuture:
    """Start :func:`plan_queries` without waiting for the device; its arguments, errors and plan are the same.

    Between this call and :meth:`QueryPlanFuture.result` a caller can queue work on the device that needs no plan, such
    as the projection of keys and values, and so keep the device busy while the host waits to learn how many queries
    there are. On the CPU, and while torch.compile or torch.export trace, the plan is made at once.

    Returns:
        What the plan will come from. With DGE_CHECK=1 this call waits for the device, to look at `choice`.

    Example:
        >>> import torch, dge_kernels
        >>> future = dge_kernels.plan_queries_async(torch.tensor([[[0, 2]]]), splits=(2, 1, 4), num_prefix_tokens=1)
        >>> future.result().total
        21
    """
    arguments = _plan_arguments(choice, splits, grid, num_prefix_tokens)
    if not choice.is_cuda or torch.compiler.is_compiling():
        patches, cu_seqlens, longest = _call_plan(_ops.plan_queries, *arguments)
        plan = _plan(patches, cu_seqlens, longest, arguments)
        return QueryPlanFuture(lambda: True, lambda: plan)
    sums, cu_seqlens = _call_plan(_ops.count_queries, *arguments)
    ends = HostCopy(cu_seqlens)

    def finish() -> QueryPlan:
        counts = ends.read().tolist()
        patches = _ops.write_patches(choice, sums, *arguments[1:], counts[-1])
        longest = max((end - start for start, end in pairwise(counts)), default=0)
        return _plan(patches, cu_seqlens, longest, arguments)

    return QueryPlanFuture(ends.ready, finish)


_PlanArguments = tuple[Tensor, list[int], int, int, int]


def _plan_arguments(
    choice: Tensor, splits: tuple[int, ...], grid: tuple[int, int] | None, num_prefix_tokens: int
) -> _PlanArguments:
    """What the operators of a plan take, once it has been checked."""
    _checks.check_splits(splits)
    _checks.check_choice(choice, grid, splits)
    size = region_size(splits)
    height, width = grid if grid is not None else (choice.shape[1] * size, choice.shape[2] * size)
    _checks.check_grid((height, width), num_prefix_tokens)
    _library.require(choice.device)
    if _CHECK_DEVICE_VALUES and choice.is_cuda and choice.numel():
        low, high = (int(value) for value in choice.aminmax())
        if low < 0 or high >= len(splits):
            raise ValueError(f"choice must be in [0, {len(splits)}), got values from {low} to {high}")
    return choice, list(splits), height, width, num_prefix_tokens


def _call_plan(operator: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if "choice must be in" not in str(error):
            raise
        raise ValueError(str(error)) from None


def _plan(patches: Tensor, cu_seqlens: Tensor, longest: int, arguments: _PlanArguments) -> QueryPlan:
    _, splits, height, width, num_prefix_tokens = arguments
    return QueryPlan(patches, cu_seqlens, (height, width), num_prefix_tokens, tuple(splits), longest)


def pool_queries(x: Tensor, plan: QueryPlan) -> Tensor:
    """Average the tokens of each query's patch; a prefix token is its own query, unchanged.

    Args:
        x: [B, N, C], the tokens that `plan` was made for.
        plan: From :func:`plan_queries`.

    Returns:
        [Q, C], in the dtype of `x`.

    Raises:
        TypeError: `x` is not a tensor of a supported dtype.
        ValueError: `x` is not of the plan's batch, tokens or device.

    Example:
        >>> import torch, dge_kernels
        >>> plan = dge_kernels.plan_queries(torch.tensor([[[1]]]), splits=(2, 1))
        >>> dge_kernels.pool_queries(torch.tensor([[[1.0], [2.0], [3.0], [6.0]]]), plan)
        tensor([[3.]])
    """
    _checks.check_pool(x, plan)
    _vmap.refuse_derivatives("pool_queries", x)
    _library.require(x.device)
    result: Tensor = _ops.pool_queries(x, plan.patches, *plan.grid, plan.num_prefix_tokens)
    return result


def unpool_queries(delta: Tensor, plan: QueryPlan, residual: Tensor) -> Tensor:
    """Add each query's row to every token of its patch.

    Args:
        delta: [Q, C], one row per query.
        plan: From :func:`plan_queries`.
        residual: [B, N, C], in the dtype of `delta`; under autocast `delta` is converted to it.

    Returns:
        [B, N, C], a new tensor.

    Raises:
        TypeError: An argument is not a tensor of a supported dtype, or the dtypes differ.
        ValueError: `delta` or `residual` is not of the plan's queries, tokens or device.

    Example:
        >>> import torch, dge_kernels
        >>> plan = dge_kernels.plan_queries(torch.tensor([[[1]]]), splits=(2, 1))
        >>> dge_kernels.unpool_queries(torch.tensor([[10.0]]), plan, torch.zeros(1, 4, 1)).flatten()
        tensor([10., 10., 10., 10.])
    """
    if isinstance(delta, Tensor) and isinstance(residual, Tensor):
        delta = _autocast.delta_for(delta, residual)
    _checks.check_unpool(delta, plan, residual)
    _vmap.refuse_derivatives("unpool_queries", delta, residual)
    _library.require(residual.device)
    result: Tensor = _ops.unpool_queries(delta, plan.patches, residual, *plan.grid, plan.num_prefix_tokens)
    return result


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
    """Softmax attention of each image's queries over all keys of that image, and of no other.

    Queries are packed, image after image. Keys are dense, as many for every image, or packed too (`cu_seqlens_k`), for
    images of several sizes or tokens that were merged. A query whose image has no keys gets zeros.

    Half-precision inputs on a CUDA device go through `torch.nn.attention.varlen` where it supports the device
    and the head; everything else through this package's own kernels.

    Args:
        q: [Q, h, d], packed as `plan` or `cu_seqlens_q` says.
        k: [B, N, h, d]; N need not be the plan's number of tokens. With `cu_seqlens_k` [K, h, d].
        v: As k.
        plan: From :func:`plan_queries`; only its division into images matters here.
        scale: Factor on the scores, 1/√d by default.
        cu_seqlens_q: Instead of a plan, int32 [B + 1]: image b has the queries
            ``cu_seqlens_q[b]:cu_seqlens_q[b + 1]``. It rises from 0 to Q; the CPU checks that, CUDA does not.
        cu_seqlens_k: int32 [B + 1], the same for packed keys; it rises from 0 to K.
        bias: Added to the scores after `scale`: one number per key, [B, N] or [K], or one per key and head,
            [B, N, h] or [K, h]. Of any supported dtype; it is added in float32 (float64 for float64 queries). -inf
            masks a key. A query with no other keys gets zeros, or in `torch.nn.attention.varlen` the mean of their
            values. There a bias takes at least three more channels per head.
        max_seqlen_q: Beside `cu_seqlens_q`, the most queries of one image, or more. `torch.nn.attention.varlen` does
            less idle work where it is given; it is Q by default.
        max_seqlen_k: Beside `cu_seqlens_k`, the same for keys; K by default.

    Returns:
        [Q, h, d], in the dtype of `q` (autocast's where it is on). Differentiable in q, k, v and bias.

    Raises:
        TypeError: An argument is not a tensor of a supported dtype, or the dtypes differ.
        ValueError: Shapes or devices do not fit the plan or each other, or both or neither of `plan` and
            `cu_seqlens_q` are given, or on the CPU their values are not as above.

    Example:
        >>> import torch, dge_kernels
        >>> plan = dge_kernels.plan_queries(torch.tensor([[[0]]]), splits=(1,))
        >>> q, k = torch.zeros(1, 1, 2), torch.zeros(1, 3, 1, 2)
        >>> v = torch.tensor([[0.0, 3.0], [3.0, 3.0], [6.0, 3.0]]).view(1, 3, 1, 2)
        >>> dge_kernels.ragged_attention(q, k, v, plan).flatten()
        tensor([3., 3.])

        Two images, of one and of two tokens, the last of which counts three times:

        >>> ends = torch.tensor([0, 1, 3], dtype=torch.int32)
        >>> q, sizes = torch.zeros(3, 1, 2), torch.tensor([1.0, 1.0, 3.0])
        >>> arguments = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "bias": sizes.log()}
        >>> dge_kernels.ragged_attention(q, q, v.view(3, 1, 2) * 4, **arguments)[:, 0].round(decimals=3)
        tensor([[ 0., 12.],
                [21., 12.],
                [21., 12.]])
    """
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        q, k, v = _autocast.attention_inputs(q, k, v)
    _checks.check_attention(q, k, v, plan, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), bias)
    _vmap.refuse_derivatives("ragged_attention", q, k, v, *([] if bias is None else [bias]))
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if plan is not None:
        ends, max_seqlen_q = plan.cu_seqlens, plan.max_seqlen
    else:
        ends, max_seqlen_q = cast(Tensor, cu_seqlens_q), q.shape[0] if max_seqlen_q is None else max_seqlen_q
    if bias is not None:
        bias = bias.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        bias = bias.unsqueeze(-1).expand(k.shape[:-1]) if bias.dim() < k.dim() - 1 else bias
    if _varlen.fits(q, k, bias, factor):
        max_seqlen_k = k.shape[-3] if max_seqlen_k is None else max_seqlen_k
        return _varlen.attention(q, k, v, (ends, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), factor, bias)
    _library.require(q.device)
    try:
        result: Tensor = _ops.ragged_attention(q, k, v, ends, max_seqlen_q, factor, cu_seqlens_k, bias)[0]
    except RuntimeError as error:
        message = str(error)
        if "cu_seqlens_k must rise" not in message and (plan is not None or "cu_seqlens must rise" not in message):
            raise
        raise ValueError(message.replace("cu_seqlens must", "cu_seqlens_q must")) from None
    return result


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    splits: tuple[int, ...] = (4, 2, 1),
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Choose a split for each region: the argmax of a linear layer of the region's mean token.

    One pass over the tokens, for inference; no gradient flows. Logits are computed in float32 (float64 for
    float64 tokens), whatever the dtypes given.

    Args:
        x: [B, N, C].
        weight: [n, C], one row per split.
        bias: [n] or None.
        grid: (H, W) in tokens.
        splits: The n splits; the largest, S, is the region's side in tokens.
        num_prefix_tokens: Tokens in front of the grid, which the router does not see.

    Returns:
        uint8 [B, ⌈H/S⌉, ⌈W/S⌉], indices into `splits`; the first of equal logits wins.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Shapes, devices, `splits` or `grid` do not fit each other.

    Example:
        >>> import torch, dge_kernels
        >>> x = torch.tensor([[[1.0], [1.0], [-1.0], [-1.0]]])
        >>> dge_kernels.route(x, torch.tensor([[1.0], [-1.0]]), grid=(1, 4), splits=(2, 1))
        tensor([[[0, 1]]], dtype=torch.uint8)
    """
    _checks.check_route(x, weight, bias, grid, splits, num_prefix_tokens)
    _library.require(x.device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    offset = weight.new_zeros(len(splits), dtype=wide) if bias is None else bias.detach().to(wide)
    x, weight = x.detach(), weight.detach().to(wide)
    choice: Tensor = _ops.route(x, weight, offset, region_size(splits), *grid, num_prefix_tokens)
    return choice
