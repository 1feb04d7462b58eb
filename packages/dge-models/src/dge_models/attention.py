"""timm's attention with queries of its own: the modules are timm's, only the order of calls is new here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from dge_models.projections import has_hooks, is_plain, linear_shape, project

__all__ = [
    "TIMM_ATTENTION",
    "Kernel",
    "KnownAttention",
    "attend",
    "attention_output",
    "full_attention",
    "input_width",
    "keys_values",
    "refuse_hooks",
    "refuse_unsupported",
]

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class KnownAttention:
    """The attention of one kind of block, as far as a routed block can stand for it.

    Attributes:
        types: The classes that it may be of.
        parts: Names of the modules that it may have.
        linear: Those that have to be linear layers, plain ones or what has taken their place.
    """

    types: tuple[type[nn.Module], ...]
    parts: frozenset[str]
    linear: tuple[str, ...] = ("proj",)


TIMM_ATTENTION = KnownAttention(
    (Attention,),
    frozenset({"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}),
    ("qkv", "proj"),
)


def refuse_unsupported(attn: Any, name: str, known: KnownAttention = TIMM_ATTENTION) -> None:
    """Check that a routed block computes what a plain block with this attention would.

    Args:
        attn: The attention of a block.
        name: How to call it in the error, such as "blocks.3.attn".
        known: What it may be.

    Raises:
        ValueError: It is of another class, has parts that are not known here, projects with something else than
            linear layers, or drops attention weights.
    """
    kind: type = type(attn)
    expected = " or ".join(known_type.__name__ for known_type in known.types)
    if kind not in known.types:
        raise ValueError(
            f"{name}: got {kind.__name__}; expected timm's {expected} (windowed and "
            "differential attention can't take pooled queries)"
        )
    unknown = sorted({child for child, _ in attn.named_children()} - known.parts)
    if unknown:
        raise ValueError(f"{name}: has unknown parts {unknown}; expected those of timm's {expected}")
    for part in known.linear:
        if linear_shape(getattr(attn, part)) is None:
            got = type(getattr(attn, part)).__name__
            raise ValueError(f"{name}.{part}: got {got}; expected a linear layer, with in_features and out_features")
    if attn.attn_drop.p > 0:
        raise ValueError(f"{name}: attention dropout is {attn.attn_drop.p}; expected 0, it is not supported")


def input_width(attn: Any) -> int:
    """C, the width of the tokens that an attention takes and, as a residual is added, gives."""
    shape = linear_shape(attn.proj)
    if shape is None:
        got = type(attn.proj).__name__
        raise ValueError(f"attn.proj: got {got}; expected a linear layer, with in_features and out_features")
    return shape[1]


def refuse_hooks(attn: Any, name: str) -> None:
    """Check that nobody waits for calls which a routed block does not make.

    It calls the projections and norms of its attention, but not the attention as a whole, and there are no weights of
    every token for every token that its dropout could be given.

    Args:
        attn: The attention of a routed block.
        name: How to call it in the error, such as "blocks.3.attn".

    Raises:
        RuntimeError: There are hooks on `attn` or on its dropout, or their ``forward`` is replaced.
    """
    if has_hooks(attn):
        raise RuntimeError(
            f"{name}: got a hook or another forward; expected none, a routed block computes its queries and its keys "
            f"apart and never calls its attention as a whole. What attention adds is the output of {name}.proj"
        )
    if has_hooks(attn.attn_drop):
        raise RuntimeError(
            f"{name}.attn_drop: got a hook or another forward; expected none, a routed block has no attention map of "
            "every token for every token. dge_models.trace gives what each region got; the plain model has maps"
        )


def keys_values(attn: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values that queries attend to, with the modules and parameters of timm's attention.

    Args:
        attn: Where the projection, the norm and the head count come from.
        tokens: [B, N, C], normalised.

    Returns:
        Keys and values, [B, N, h, d] each.
    """
    inner = attn.num_heads * attn.head_dim
    if torch.onnx.is_in_onnx_export() and is_plain(attn.qkv):  # its runtimes copy both parts of what is split
        parts = (project(attn.qkv, tokens, slice(part * inner, (part + 1) * inner)) for part in (1, 2))
        k, v = (torch.unflatten(part, -1, (attn.num_heads, attn.head_dim)) for part in parts)
    else:
        kv = project(attn.qkv, tokens, slice(inner, None))
        k, v = torch.unflatten(kv, -1, (2, attn.num_heads, attn.head_dim)).unbind(-3)
    # Under autocast a norm may widen its output; timm's attention narrows it again, as every matmul does.
    return attn.k_norm(k).to(v.dtype), v


def attend(attn: Attention, queries: Tensor, keys: Tensor, values: Tensor, kernel: Kernel) -> Tensor:
    """Attention of `queries`, with the modules and parameters of timm's attention.

    Args:
        attn: Where the projections, norms and head count come from. With keys and values of the same tokens as
            `queries` the result is ``attn(tokens)``.
        queries: [..., C], normalised.
        keys: [B, N, h, d], from :func:`keys_values`.
        values: [B, N, h, d], from :func:`keys_values`.
        kernel: Maps q [..., h, d], k and v to [..., h, d].

    Returns:
        [..., C], after the output projection and its dropout.
    """
    q = project(attn.qkv, queries, slice(None, attn.num_heads * attn.head_dim))
    q = attn.q_norm(torch.unflatten(q, -1, (attn.num_heads, attn.head_dim))).to(values.dtype)
    return attention_output(attn, kernel(q, keys, values), queries)


def attention_output(attn: Any, mixed: Tensor, queries: Tensor) -> Tensor:
    """What follows the mixing of values in timm's attentions.

    Args:
        attn: Where the norm, the gate and the output projection come from.
        mixed: [..., h, d], one mixture of values per query and head.
        queries: [..., C], normalised.

    Returns:
        [..., C], after the output projection and its dropout.
    """
    out = attn.norm(mixed.flatten(-2))
    gate = getattr(attn, "gate", None)  # newer releases of timm have an optional output gate
    if gate is not None:
        out = out * gate(queries).sigmoid()
    result: Tensor = attn.proj_drop(attn.proj(out))
    return result


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of [B, F, h, d] over [B, N, h, d]."""
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
