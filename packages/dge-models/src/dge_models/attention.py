"""timm's attentions with queries of their own: the modules are timm's, only the order of calls is new here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from dge_models.pvt_block import ReducedAttention

__all__ = ["attend", "input_width", "keys_values", "reduce_tokens", "refuse_unsupported"]

_KNOWN: dict[type[nn.Module], set[str]] = {
    Attention: {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"},
    ReducedAttention: {"q", "kv", "attn_drop", "proj", "proj_drop", "sr", "norm"},
}


def refuse_unsupported(attn: Any, name: str) -> None:
    """Check that :func:`attend` computes what timm's attention would.

    Args:
        attn: The attention of a block.
        name: How to call it in the error, such as "blocks.3.attn".

    Raises:
        ValueError: It is neither timm's plain ``Attention`` nor that of timm's pyramids with a strided
            convolution, has parts that are not known here, projects with something else than linear layers,
            or drops attention weights.
    """
    if type(attn) not in _KNOWN:
        raise ValueError(
            f"{name}: got {type(attn).__name__}; expected timm's Attention (rotary, windowed and "
            "differential attention can't take pooled queries)"
        )
    unknown = sorted({child for child, _ in attn.named_children()} - _KNOWN[type(attn)])
    if unknown:
        raise ValueError(f"{name}: has unknown parts {unknown}; expected those of timm's Attention")
    for part in ("q", "kv", "proj") if type(attn) is ReducedAttention else ("qkv", "proj"):
        if type(getattr(attn, part)) is not nn.Linear:
            got = type(getattr(attn, part)).__name__
            raise ValueError(f"{name}.{part}: got {got}; expected a plain torch.nn.Linear")
    if attn.attn_drop.p > 0:
        raise ValueError(f"{name}: attention dropout is {attn.attn_drop.p}; expected 0, it is not supported")


def input_width(attn: Any) -> int:
    """C, the width of the tokens that an attention takes."""
    projection = attn.q if isinstance(attn, ReducedAttention) else attn.qkv
    width: int = projection.in_features
    return width


def keys_values(attn: Attention | ReducedAttention, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The keys and values that queries attend to, with the modules and parameters of one of timm's attentions.

    Args:
        attn: Where the projection, the norm and the head count come from.
        tokens: [B, N, C], normalised.
        grid: (H, W) of the spatial tokens; for a spatial reduction all N of them.

    Returns:
        Keys and values, [B, M, h, d] each; M is N, or the number of tokens after a spatial reduction.
    """
    if isinstance(attn, ReducedAttention):
        kv = attn.kv(reduce_tokens(attn, tokens, grid))
    else:
        inner = attn.num_heads * attn.head_dim
        weight, bias = attn.qkv.weight, attn.qkv.bias
        kv = F.linear(tokens, weight[inner:], None if bias is None else bias[inner:])
    k, v = torch.unflatten(kv, -1, (2, attn.num_heads, attn.head_dim)).unbind(-3)
    # Under autocast a norm may widen its output; timm's attention narrows it again, as every matmul does.
    return k if isinstance(attn, ReducedAttention) else attn.k_norm(k).to(v.dtype), v


def attend(
    attn: Attention | ReducedAttention,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attention of `queries`, with the modules and parameters of one of timm's attentions.

    Args:
        attn: Where the projections, norms and head count come from. With keys and values of the same tokens as
            `queries` the result is ``attn(tokens)``.
        queries: [..., C], normalised.
        keys: [B, M, h, d], from :func:`keys_values`.
        values: [B, M, h, d], from :func:`keys_values`.
        kernel: Maps q [..., h, d], k and v to [..., h, d].

    Returns:
        [..., C], after the output projection and its dropout.
    """
    if isinstance(attn, ReducedAttention):
        q = torch.unflatten(attn.q(queries), -1, (attn.num_heads, attn.head_dim))
        result: Tensor = attn.proj_drop(attn.proj(kernel(q, keys, values).flatten(-2)))
        return result
    inner = attn.num_heads * attn.head_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q = F.linear(queries, weight[:inner], None if bias is None else bias[:inner])
    q = attn.q_norm(torch.unflatten(q, -1, (attn.num_heads, attn.head_dim))).to(values.dtype)
    out = attn.norm(kernel(q, keys, values).flatten(-2))
    gate = getattr(attn, "gate", None)  # newer releases of timm have an optional output gate
    if gate is not None:
        out = out * gate(queries).sigmoid()
    result = attn.proj_drop(attn.proj(out))
    return result


def reduce_tokens(attn: ReducedAttention, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tokens that keys and values are made of: after the strided convolution and its norm, if there are any.

    Args:
        attn: Of reduction R.
        tokens: [B, N, C], normalised.
        grid: (H, W); N is H·W where R > 1.

    Returns:
        [B, ⌊H/R⌋·⌊W/R⌋, C], or the tokens themselves.
    """
    if attn.sr is None:
        return tokens
    reduced = attn.sr(torch.unflatten(tokens, 1, grid).permute(0, 3, 1, 2))
    result: Tensor = attn.norm(reduced.flatten(2).transpose(1, 2))
    return result
