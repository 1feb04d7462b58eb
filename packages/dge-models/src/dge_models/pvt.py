"""The Pyramid Vision Transformer (first version), plain and with routed blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers.norm import LayerNorm
from torch import nn

from dge_models.pvt_block import PyramidBlock
from dge_models.pyramid import Pyramid, check_stages
from dge_models.routed_pyramid import RoutedPyramid

__all__ = ["DGEPyramidVisionTransformer", "PyramidVisionTransformer"]


class PyramidVisionTransformer(Pyramid):
    """Four stages of decreasing resolution; keys and values of a stage come from a reduced grid.

    A timm model: its parameters have the names of timm's pyramids (``stages.0.blocks.0.attn.kv`` ...), and
    it has the methods that timm's models have. It takes images of any size from 32 × 32 pixels on:
    position embeddings are interpolated at call time.

    Source: Wang et al., "Pyramid Vision Transformer", ICCV 2021.

    Args:
        img_size: Pixels that the position embeddings are made for.
        in_chans: Channels of the images.
        num_classes: Of the head; 0 leaves the pooled features.
        global_pool: What the head sees: "token" (the class token), "avg", "avgmax", "max" of the last
            stage's spatial tokens, or "" for all tokens.
        patch_sizes: Input pixels per side of a token, per stage.
        embed_dims: Widths, per stage.
        depths: Blocks, per stage.
        num_heads: Attention heads, per stage.
        mlp_ratios: Hidden over outer width of the MLPs, per stage.
        sr_ratios: Tokens per side that one key stands for, per stage.
        class_token: Put a class token in front of the last stage's tokens.
        qkv_bias: Whether queries, keys and values have biases.
        dynamic_img_size: Take any image size; otherwise `img_size` alone.
        drop_rate: Dropout in front of the head.
        pos_drop_rate: Dropout after the position embeddings.
        proj_drop_rate: Dropout after output projections and in MLPs.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        norm_layer: Of the blocks and in front of the head; timm's LayerNorm with ε 1e-6 by default.
        act_layer: Of the MLPs.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: The lists differ in length, `global_pool` is unknown or needs a class token that is not
            there, the class token would join a reduced grid, or `img_size` is too small.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 256,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        class_token: bool = True,
        qkv_bias: bool = True,
        dynamic_img_size: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.Module] | partial[nn.Module] | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_stages(
            patch_sizes=patch_sizes,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
        )
        if class_token and sr_ratios[-1] != 1:
            raise ValueError(f"sr_ratios: got {tuple(sr_ratios)}; expected 1 last, a class token can't be reduced")
        new_norm: Any = norm_layer if norm_layer is not None else partial(LayerNorm, eps=1e-6)
        new_block: Any = partial(
            PyramidBlock,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop_rate,
            attn_drop=attn_drop_rate,
            norm_layer=new_norm,
            act_layer=act_layer,
        )
        stages = zip(num_heads, sr_ratios, mlp_ratios, strict=True)
        super().__init__(
            img_size,
            [
                partial(new_block, num_heads=heads, sr_ratio=reduction, mlp_ratio=ratio)
                for heads, reduction, ratio in stages
            ],
            new_norm,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            patch_sizes=patch_sizes,
            embed_dims=embed_dims,
            depths=depths,
            smallest_grids=sr_ratios,
            class_token=class_token,
            dynamic_img_size=dynamic_img_size,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )


class DGEPyramidVisionTransformer(RoutedPyramid, PyramidVisionTransformer):
    """A pyramid all of whose blocks route their queries; keys and values come from the reduced dense tokens.

    Source: Song et al., "Dynamic Grained Encoder for Vision Transformers", NeurIPS 2021.

    Args:
        *args: What :class:`PyramidVisionTransformer` takes.
        splits: See :class:`~dge_models.routed_pyramid.RoutedPyramid`.
        training_mode: See there.
        drop_path_mode: See there.
        **kwargs: What :class:`PyramidVisionTransformer` takes.
    """
