"""The blocks of the Pyramid Vision Transformer, plain and routed: keys and values are reduced."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_notrace_module
from timm.models.pvt_v2 import Attention as ReducedAttention
from timm.models.vision_transformer import Block
from torch import Tensor

from dge_models.attention import Kernel, KnownAttention
from dge_models.encoder import DGEBlock, Heads, Patches

__all__ = ["DGEPyramidBlock", "PyramidBlock", "ReducedAttention", "reduce_tokens"]


@register_notrace_module
class PyramidBlock(Block):
    """timm's ``Block`` with the attention of timm's pyramid models.

    Queries are all tokens; keys and values are the tokens after a convolution of stride and size
    `sr_ratio` and a layer norm (ε 1e-5). Parameters: ``norm1``, ``attn.q``, ``attn.kv`` (keys first),
    ``attn.sr``, ``attn.norm``, ``attn.proj``, ``norm2``, ``mlp.fc1``, ``mlp.fc2``.

    Source: Wang et al., "Pyramid Vision Transformer", ICCV 2021, section 3.3.

    Args:
        dim: C, the tokens' width.
        num_heads: Attention heads.
        sr_ratio: R, tokens per side that one key stands for; 1 reduces nothing.
        qkv_bias: Whether queries, keys and values have biases.
        attn_drop: Dropout of attention weights.
        proj_drop: Dropout after the output projection, and in the MLP.
        device: Of the parameters.
        dtype: Of the parameters.
        **kwargs: What else timm's ``Block`` takes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, proj_drop=proj_drop, device=device, dtype=dtype, **kwargs)
        self.attn = ReducedAttention(
            dim,
            num_heads,
            sr_ratio=sr_ratio,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )

    # The reduction has to know the grid. (TorchScript reads what follows on the line of a type comment.)
    def forward(  # type: ignore[override]
        self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0
    ) -> Tensor:
        """Run the block.

        Args:
            x: [B, T + H·W, C] tokens, prefix tokens first.
            grid: (H, W) of the spatial tokens, at least R × R.
            num_prefix_tokens: T; 0 where the block reduces.

        Returns:
            Tokens of the shape of `x`.
        """
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), [grid[0], grid[1]])))
        result: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
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


class DGEPyramidBlock(DGEBlock, PyramidBlock):  # type: ignore[misc]  # both know the grid; a routed one more
    """A pyramid's block whose queries route; keys and values come from the reduced dense tokens."""

    plain = PyramidBlock
    attention = KnownAttention(
        (ReducedAttention,),
        frozenset({"q", "kv", "attn_drop", "proj", "proj_drop", "sr", "norm"}),
        ("q", "kv", "proj"),
    )
    attn: ReducedAttention

    def make_keys(self, normed: Tensor, grid: tuple[int, int], positions: Any) -> Heads:
        """Keys and values of the reduced tokens, [B, M, h, d] each."""
        kv = self.attn.kv(reduce_tokens(self.attn, normed, grid))
        k, v = torch.unflatten(kv, -1, (2, self.attn.num_heads, self.attn.head_dim)).unbind(-3)
        return k, v

    def attend(self, normed: Tensor, keys: Heads, kernel: Kernel, positions: Any, patches: Patches) -> Tensor:
        """What attention adds to the queries, a tensor of the shape of `normed`."""
        q = torch.unflatten(self.attn.q(normed), -1, (self.attn.num_heads, self.attn.head_dim))
        result: Tensor = self.attn.proj_drop(self.attn.proj(kernel(q, *keys).flatten(-2)))
        return result
