"""Ragged attention through PyTorch's own variable-length kernel, where that exists and fits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dge_kernels.plan import QueryPlan

__all__ = ["attention", "fits"]

# FlashAttention's limits: half types, Ampere or newer, heads of up to 256 channels in multiples of 8.
_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
_attend: Callable[..., Any] = varlen_attn  # its keywords differ between versions of torch
_TAKES_SCALE = "scale" in inspect.signature(varlen_attn).parameters


def fits(q: Tensor, k: Tensor) -> bool:
    """Whether torch's kernel takes queries and keys like these: [Q, h, d] and [B, N, h, d]."""
    if not q.is_cuda or q.dtype not in _DTYPES or k.shape[0] == 0:
        return False
    head = q.shape[-1]
    return head <= _LARGEST_HEAD and head % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def attention(q: Tensor, k: Tensor, v: Tensor, plan: QueryPlan, scale: float) -> Tensor:
    """As :func:`dge_kernels.ragged_attention`, for inputs that :func:`fits` accepts."""
    batch, keys = k.shape[:2]
    ends = torch.arange(0, (batch + 1) * keys, keys, dtype=torch.int32, device=q.device)
    packed = (q, k.flatten(0, 1), v.flatten(0, 1), plan.cu_seqlens, ends, plan.max_seqlen, keys)
    if _TAKES_SCALE:
        return _attend(*packed, scale=scale)
    # Older kernels always scale by 1/sqrt(d): what is left of the factor goes into q.
    return _attend(q * (scale * q.shape[-1] ** 0.5), *packed[1:])
