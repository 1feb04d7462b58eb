"""What autocast does to the operators: the rules that torch has for their dense counterparts.

Attention runs in autocast's dtype, as scaled_dot_product_attention does. Pooling keeps its input's dtype.
Unpooling keeps the residual's, as `x + branch` would for a float32 x and a branch in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_inputs", "delta_for"]


def attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's dtype where it is on; float64 is left alone, as torch leaves it."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind) or torch.float64 in (q.dtype, k.dtype, v.dtype):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def delta_for(delta: Tensor, residual: Tensor) -> Tensor:
    """`delta` in the residual's dtype where autocast is on."""
    return delta.to(residual.dtype) if torch.is_autocast_enabled(delta.device.type) else delta
