"""Ragged attention through PyTorch's own variable-length kernel, where that exists and fits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad

__all__ = ["attention", "fits", "with_bias"]

# FlashAttention's limits: half types, Ampere or newer, heads of up to 256 channels in multiples of 8.
_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
_BIAS_PARTS = 3  # numbers of 8 (bfloat16) or 11 (float16) bits that hold a float32 between them
_attend: Callable[..., Any] = varlen_attn  # its keywords differ between versions of torch
_TAKES_SCALE = "scale" in inspect.signature(varlen_attn).parameters


def _head_with_bias(head: int) -> int:
    return -(-(head + _BIAS_PARTS) // 8) * 8


def fits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> bool:
    """Whether torch's kernel takes inputs like these: q [Q, h, d], k [B, N, h, d] or [K, h, d], and a bias."""
    if not q.is_cuda or q.dtype not in _DTYPES or k.shape[0] == 0 or (bias is not None and scale == 0):
        return False
    head = q.shape[-1] if bias is None else _head_with_bias(q.shape[-1])
    return head <= _LARGEST_HEAD and head % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Heads with more channels, in which the bias is part of the product of queries and keys.

    The queries' new channels are ones, the keys' hold bias / scale in parts of their dtype (-inf as a number so low
    that its probability is 0), the values' are zeros.

    Args:
        q: [..., h, d].
        k: [..., h, d].
        v: [..., h, d].
        bias: float32 [..., h], one number per key and head.
        scale: What the products will be multiplied by; not 0.

    Returns:
        q, k and v with D ≥ d + 3 channels, a multiple of 8: softmax(scale · q kᵀ) v is that of the arguments with the
        bias added to the scores, and zeros behind its first d channels.
    """
    head = q.shape[-1]
    more = _head_with_bias(head) - head
    limit = min(torch.finfo(k.dtype).max, 1e30)
    left, parts = bias / scale, []
    for _ in range(_BIAS_PARTS):
        parts.append(left.clamp(-limit, limit).to(k.dtype))
        left = (left - parts[-1]).detach()
    channels = pad(torch.stack(parts, -1), (0, more - _BIAS_PARTS))
    return pad(q, (0, more), value=1.0), torch.cat([k, channels], -1), pad(v, (0, more))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: tuple[Tensor, Tensor | None],
    longest: tuple[int, int],
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """As :func:`dge_kernels.ragged_attention`, for inputs that :func:`fits` accepts.

    `ends` and `longest` are those of the queries and of the keys; `bias` is float32, of k's shape without channels.
    """
    ends_q, ends_k = ends
    if ends_k is None:
        batch, keys = k.shape[:2]
        ends_k = torch.arange(0, (batch + 1) * keys, keys, dtype=torch.int32, device=q.device)
        k, v, bias = k.flatten(0, 1), v.flatten(0, 1), None if bias is None else bias.flatten(0, 1)
    head = q.shape[-1]
    options: dict[str, float] = {"scale": scale} if _TAKES_SCALE else {}
    if not _TAKES_SCALE:  # older kernels always scale by 1/√d: what is left of the factor goes into q
        width = head if bias is None else _head_with_bias(head)
        q, scale = q * (scale * width**0.5), width**-0.5
    if bias is not None:
        q, k, v = with_bias(q, k, v, bias, scale)
    out: Tensor = _attend(q, k, v, ends_q, ends_k, *longest, **options)
    return out[..., :head]
