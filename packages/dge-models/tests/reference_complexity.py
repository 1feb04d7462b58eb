"""The reference's own complexity formula, slips included, to check recorded numbers with."""

from __future__ import annotations

from torch import Tensor


def layer_complexity(
    queries: Tensor, *, tokens: int, width: int, heads: int, hidden_ratio: int, regions: float, splits: int
) -> Tensor:
    """One DeiT layer: both norms on all tokens, the router on a region count that includes the class token."""
    fixed = 2 * tokens * width + 2 * tokens * width**2 + regions * width * (1 + splits)
    attention = 2 * tokens * width + 3 * heads * tokens
    mlp = 2 * hidden_ratio * width**2 + hidden_ratio * width
    return fixed + queries * (2 * width**2 + attention + mlp)


def pyramid_layer_complexity(
    queries: Tensor, *, tokens: int, width: int, heads: int, hidden_ratio: int, reduction: int, splits: int
) -> Tensor:
    """One PVT layer: one of attention's two products, and a region count that includes the class token."""
    keys = tokens / reduction**2
    fixed = 2 * tokens * width + 2 * keys * width**2 + tokens / 16 * width * (1 + splits)
    if reduction > 1:
        fixed += tokens * width**2 + keys * width
    attention = keys * width + 3 * heads * keys
    mlp = 2 * hidden_ratio * width**2 + hidden_ratio * width
    return fixed + queries * (2 * width**2 + attention + mlp)
