"""The block of a pyramid: timm's pre-norm block whose keys and values come from a spatially reduced grid."""

from __future__ import annotations

from typing import Any

from timm.models import register_notrace_module
from timm.models.pvt_v2 import Attention as ReducedAttention
from timm.models.vision_transformer import Block
from torch import Tensor

__all__ = ["PyramidBlock", "ReducedAttention"]


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

    def forward(  # type: ignore[override]  # the reduction has to know the grid
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
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid)))
        result: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return result
