"""DPVT: a pyramid whose tokens read values at a few places of their stage's grid, plain and with routed blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers.norm import LayerNorm
from torch import nn

from dge_models.dpvt_block import DeformableBlock
from dge_models.pyramid import Pyramid, check_stages
from dge_models.routed_pyramid import RoutedPyramid

__all__ = ["DGEDeformablePyramidVisionTransformer", "DeformablePyramidVisionTransformer"]


class DeformablePyramidVisionTransformer(Pyramid):
    """Four stages of decreasing resolution with bilinear deformable attention.

    A timm model, with names and methods as :class:`~dge_models.pvt.PyramidVisionTransformer` has them. It takes images
    of any size from 32 × 32 pixels on: position embeddings are interpolated at call time. There is no class token; the
    head sees the mean of the last stage's tokens after the final norm.

    Source: the reference implementation of Song et al., "Dynamic Grained Encoder for Vision Transformers", NeurIPS
    2021, which has it beside the paper's models.

    Args:
        img_size: Pixels that the position embeddings are made for.
        in_chans: Channels of the images.
        num_classes: Of the head; 0 leaves the pooled features.
        global_pool: What the head sees: "avg", "avgmax" or "max" of the last stage's tokens, or "" for all tokens.
        patch_sizes: Input pixels per side of a token, per stage.
        embed_dims: Widths, per stage.
        depths: Blocks, per stage.
        num_heads: Attention heads, per stage.
        mlp_ratios: Hidden over outer width of the MLPs, per stage.
        num_points: Points that a head of a token reads.
        offset_gradient: By what the gradient of the points' offsets is multiplied; the reference trains with 0.1.
        dynamic_img_size: Take any image size; otherwise `img_size` alone.
        drop_rate: Dropout in front of the head.
        pos_drop_rate: Dropout after the position embeddings.
        proj_drop_rate: Dropout after output projections and in MLPs.
        attn_drop_rate: Dropout of the points' weights.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        norm_layer: Of the blocks and in front of the head; timm's LayerNorm with ε 1e-6 by default.
        act_layer: Of the MLPs.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: The lists differ in length, `global_pool` is unknown or "token", heads don't divide a width, there
            are no points, or `img_size` is too small.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 256,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        num_points: int = 4,
        offset_gradient: float = 0.1,
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
        )
        new_norm: Any = norm_layer if norm_layer is not None else partial(LayerNorm, eps=1e-6)
        new_block: Any = partial(
            DeformableBlock,
            num_points=num_points,
            offset_gradient=offset_gradient,
            proj_drop=proj_drop_rate,
            attn_drop=attn_drop_rate,
            norm_layer=new_norm,
            act_layer=act_layer,
        )
        stages = zip(num_heads, mlp_ratios, strict=True)
        super().__init__(
            img_size,
            [partial(new_block, num_heads=heads, mlp_ratio=ratio) for heads, ratio in stages],
            new_norm,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            patch_sizes=patch_sizes,
            embed_dims=embed_dims,
            depths=depths,
            smallest_grids=[1] * len(depths),
            class_token=False,
            dynamic_img_size=dynamic_img_size,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )


class DGEDeformablePyramidVisionTransformer(RoutedPyramid, DeformablePyramidVisionTransformer):
    """A deformable pyramid all of whose blocks route their queries; values come from the dense tokens.

    The reference has no such model. A pooled query reads its points around the centre of its patch.

    Args:
        *args: What :class:`DeformablePyramidVisionTransformer` takes.
        splits: See :class:`~dge_models.routed_pyramid.RoutedPyramid`.
        training_mode: See there.
        drop_path_mode: See there.
        **kwargs: What :class:`DeformablePyramidVisionTransformer` takes.
    """
