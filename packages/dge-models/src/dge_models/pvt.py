"""The Pyramid Vision Transformer (first version), plain and with routed blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import torch.fx
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.helpers import to_2tuple
from timm.layers.norm import LayerNorm
from timm.layers.pool1d import global_pool_nlc
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from dge_models.encoder import DGEBlock, DropPathMode, TrainingMode
from dge_models.pvt_contract import PyramidContract
from dge_models.pvt_stage import PyramidStage
from dge_models.routed import RoutedModel, routed_blocks

__all__ = ["DGEPyramidVisionTransformer", "PyramidVisionTransformer"]


class PyramidVisionTransformer(PyramidContract):
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
        super().__init__()
        _check_stages(patch_sizes, embed_dims, depths, num_heads, mlp_ratios, sr_ratios)
        if class_token and sr_ratios[-1] != 1:
            raise ValueError(f"sr_ratios: got {tuple(sr_ratios)}; expected 1 last, a class token can't be reduced")
        new_norm: Any = norm_layer if norm_layer is not None else partial(LayerNorm, eps=1e-6)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.embed_dims = tuple(embed_dims)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        self.num_prefix_tokens = int(class_token)
        self.dynamic_img_size = dynamic_img_size
        self.global_pool = self._check_pool(global_pool)
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        strides = list(accumulate(patch_sizes, mul))
        self.smallest_size = max(stride * reduction for stride, reduction in zip(strides, sr_ratios, strict=True))
        if min(self.img_size) < self.smallest_size:
            raise ValueError(f"img_size: got {self.img_size}; expected at least {self.smallest_size} pixels per side")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.Sequential()
        self.feature_info = []
        for index, stride in enumerate(strides):
            last = index == len(depths) - 1
            stage = PyramidStage(
                (self.img_size[0] // stride, self.img_size[1] // stride),
                embed_dims[index - 1] if index else in_chans,
                embed_dims[index],
                depths[index],
                num_heads[index],
                patch_size=patch_sizes[index],
                sr_ratio=sr_ratios[index],
                mlp_ratio=mlp_ratios[index],
                class_token=class_token and last,
                drop_path=rates[index],
                pos_drop=pos_drop_rate,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                norm_layer=new_norm,
                act_layer=act_layer,
                device=device,
                dtype=dtype,
            )
            self.stages.append(stage)
            self.feature_info.append({"num_chs": embed_dims[index], "reduction": stride, "module": f"stages.{index}"})
        self.norm = new_norm(self.embed_dim, device=device, dtype=dtype)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(device, dtype)
        self.init_weights()

    def init_weights(self, mode: str = "") -> None:
        """Initialise all weights again, routers included.

        Args:
            mode: Accepted as timm's models accept it; there is one initialisation.
        """
        self.apply(_init_weights)
        for block in routed_blocks(self):
            block.router.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: [B, C, H, W] images.

        Returns:
            [B, classes]; without a head the pooled features, without pooling all tokens.

        Raises:
            ValueError: The images are not [B, C, H, W], too small, or of another size than a model without
                `dynamic_img_size` takes.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens of the last stage after the final norm, [B, T + H·W, C]; class token first."""
        features: Tensor = self.norm(self._run_stages(x)[0])
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens and classify.

        Args:
            x: What :meth:`forward_features` returns.
            pre_logits: Return what the classifier would see.
        """
        x = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        return x if pre_logits else self.head(x)


class DGEPyramidVisionTransformer(PyramidVisionTransformer, RoutedModel):
    """A pyramid all of whose blocks route their queries.

    The queries of a stage are pooled from its tokens; keys and values come from the reduced dense tokens.
    The grids of the stages differ, and with them the shapes of noise and routings.

    Source: Song et al., "Dynamic Grained Encoder for Vision Transformers", NeurIPS 2021.

    Args:
        *args: What :class:`PyramidVisionTransformer` takes.
        splits: Queries per region side, finest first; the first is the region's side in tokens.
        training_mode: "dense" or "sparse", see :class:`DGEBlock`.
        drop_path_mode: "query" or "image", see :class:`DGEBlock`.
        **kwargs: What :class:`PyramidVisionTransformer` takes.

    Raises:
        ValueError: As in :class:`PyramidVisionTransformer` and :class:`DGEBlock`.
    """

    def __init__(
        self,
        *args: Any,
        splits: tuple[int, ...] = (4, 2, 1),
        training_mode: TrainingMode = "dense",
        drop_path_mode: DropPathMode = "query",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, stage in self.stages.named_children():
            for index, block in enumerate(stage.blocks):
                stage.blocks[index] = DGEBlock.adopt(
                    block,
                    f"stages.{name}.blocks.{index}",
                    splits=splits,
                    training_mode=training_mode,
                    drop_path_mode=drop_path_mode,
                )

    def forward(self, x: Tensor, *, noise: Sequence[Tensor] | None = None, return_routing: bool = False) -> Any:
        """Classify images.

        Args:
            x: [B, C, H, W] images.
            noise: As in :meth:`forward_routed`.
            return_routing: Return (logits, routings) instead of the logits. Through this argument the
                routings also come out of wrappers that know ``forward`` alone, such as DDP.

        Returns:
            What the plain model returns; with `return_routing` and one :class:`Routing` per block.

        Raises:
            ValueError: As in the plain model, or `noise` doesn't fit.
        """
        # torch.fx passes a proxy for every argument; what has a default keeps it in the traced graph.
        if isinstance(x, torch.fx.Proxy):
            noise, return_routing = None, False
        tokens, routings, _ = self._run_stages(x, noise=noise, return_routing=return_routing)
        logits = self.forward_head(self.norm(tokens))
        return (logits, routings) if return_routing else logits


def _check_stages(*lists: Sequence[float]) -> None:
    lengths = [len(values) for values in lists]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(
            f"patch_sizes, embed_dims, depths, num_heads, mlp_ratios, sr_ratios: got {lengths} entries; "
            "expected one per stage in each"
        )


def _init_weights(module: nn.Module) -> None:
    """The authors' initialisation; convolutions keep PyTorch's."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PyramidStage):
        module.reset_parameters()
