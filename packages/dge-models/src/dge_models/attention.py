"""timm's attention with queries of its own: the modules are timm's, only the order of calls is new here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

__all__ = ["attend", "refuse_unsupported"]

_KNOWN = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


def refuse_unsupported(attn: Any, name: str) -> None:
    """Check that :func:`attend` computes what timm's attention would.

    Args:
        attn: The attention of a block.
        name: How to call it in the error, such as "blocks.3.attn".

    Raises:
        ValueError: It is not timm's plain ``Attention``, has parts that are not known here, projects with
            something else than one linear layer, or drops attention weights.
    """
    if type(attn) is not Attention:
        raise ValueError(
            f"{name}: got {type(attn).__name__}; expected timm's Attention (rotary, windowed and "
            "differential attention can't take pooled queries)"
        )
    unknown = sorted({child for child, _ in attn.named_children()} - _KNOWN)
    if unknown:
        raise ValueError(f"{name}: has unknown parts {unknown}; expected those of timm's Attention")
    for part in ("qkv", "proj"):
        if type(getattr(attn, part)) is not nn.Linear:
            got = type(getattr(attn, part)).__name__
            raise ValueError(f"{name}.{part}: got {got}; expected a plain torch.nn.Linear")
    if attn.attn_drop.p > 0:
        raise ValueError(f"{name}: attention dropout is {attn.attn_drop.p}; expected 0, it is not supported")


def attend(
    attn: Attention, queries: Tensor, tokens: Tensor, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Attention of `queries` over `tokens`, with the modules and parameters of timm's ``Attention``.

    Args:
        attn: Where the projections, norms and head count come from. With `queries` equal to `tokens` the
            result is ``attn(tokens)``.
        queries: [..., C], normalised.
        tokens: [B, N, C], normalised.
        kernel: Maps q [..., h, d], k [B, N, h, d] and v [B, N, h, d] to [..., h, d].

    Returns:
        [..., C], after the output projection and its dropout.
    """
    inner = attn.num_heads * attn.head_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q = F.linear(queries, weight[:inner], None if bias is None else bias[:inner])
    kv = F.linear(tokens, weight[inner:], None if bias is None else bias[inner:])
    q = torch.unflatten(q, -1, (attn.num_heads, attn.head_dim))
    k, v = torch.unflatten(kv, -1, (2, attn.num_heads, attn.head_dim)).unbind(-3)
    # Under autocast a norm may widen its output; timm's attention narrows it again, as every matmul does.
    q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
    out = attn.norm(kernel(q, k, v).flatten(-2))
    gate = getattr(attn, "gate", None)  # newer releases of timm have an optional output gate
    if gate is not None:
        out = out * gate(queries).sigmoid()
    result: Tensor = attn.proj_drop(attn.proj(out))
    return result
