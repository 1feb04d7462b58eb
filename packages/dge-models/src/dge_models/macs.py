"""Multiply-accumulates of a model, per image and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dge_models.encoder import DGEBlock
from dge_models.evaluating import evaluating
from dge_models.pvt import PyramidVisionTransformer
from dge_models.routed import RoutedModel
from dge_models.routing import Routing, region_grid

__all__ = ["LayerMacs", "MacCount", "ModelMacs", "count_from_routings", "count_macs", "model_macs", "token_grid"]


@dataclass(frozen=True)
class LayerMacs:
    """The MACs of one block for one image: ``fixed + per_query * queries``."""

    fixed: int
    per_query: int
    num_tokens: int

    @property
    def static(self) -> int:
        """With as many queries as tokens."""
        return self.fixed + self.per_query * self.num_tokens


@dataclass(frozen=True)
class ModelMacs:
    """The MACs of a model for one image: its blocks, and what routing does not change."""

    layers: tuple[LayerMacs, ...]
    routed: tuple[bool, ...]
    outside: int

    @property
    def static(self) -> int:
        """With as many queries as tokens in every block."""
        return self.outside + sum(layer.static for layer in self.layers)


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of B images in a model of L blocks.

    Attributes:
        layers: float64 [L, B], what each block computed for each image, in network order, unrouted blocks
            included.
        static_layers: float64 [L], the same with every query computed.
        total: float64 [B], the whole model: blocks, patch embedding, head.
        static_total: The same with every query computed.
    """

    layers: Tensor
    static_layers: Tensor
    total: Tensor
    static_total: float


def _mlp_macs(mlp: nn.Module) -> int:
    linears = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"model: an MLP of type {type(mlp).__name__} has no linear layer; its MACs are unknown")
    return sum(linear.in_features * linear.out_features for linear in linears) + linears[0].out_features


def _layer_macs(block: Any, num_tokens: int, grid: tuple[int, int]) -> LayerMacs:
    """Norms C per row, projections, both attention products, softmax 3 per score, MLP with activation."""
    attn: Any = block.attn
    width, inner = attn.qkv.in_features, attn.num_heads * attn.head_dim
    gate = inner * width if getattr(attn, "gate", None) is not None else 0
    fixed = num_tokens * (width + 2 * width * inner)
    attention = num_tokens * (2 * inner + 3 * attn.num_heads)
    per_query = width + 2 * width * inner + gate + attention + _mlp_macs(block.mlp)
    return LayerMacs(fixed + _router_macs(block, width, grid), per_query, num_tokens)


def _router_macs(block: nn.Module, width: int, grid: tuple[int, int]) -> int:
    if not isinstance(block, DGEBlock):
        return 0
    rows, cols = region_grid(grid, block.router.splits)
    return rows * cols * width * (1 + len(block.router.splits))


def _reduced_layer_macs(block: Any, num_tokens: int, grid: tuple[int, int]) -> LayerMacs:
    """As :func:`_layer_macs`, over the tokens that are left after a spatial reduction, and the reduction itself."""
    attn: Any = block.attn
    width, keys, reduction = attn.q.in_features, num_tokens, 0
    if attn.sr is not None:
        keys = (grid[0] // attn.sr.stride[0]) * (grid[1] // attn.sr.stride[1])
        reduction = keys * (attn.sr.weight.numel() + width)
    fixed = num_tokens * width + reduction + 2 * keys * width**2 + _router_macs(block, width, grid)
    per_query = width + 2 * width**2 + keys * (2 * width + 3 * attn.num_heads) + _mlp_macs(block.mlp)
    return LayerMacs(fixed, per_query, num_tokens)


def _pyramid_macs(model: PyramidVisionTransformer, grid: tuple[int, int]) -> ModelMacs:
    layers: list[LayerMacs] = []
    routed: list[bool] = []
    head = model.head
    outside = head.in_features * head.out_features if isinstance(head, nn.Linear) else 0
    for index, stage in enumerate(model.stages):
        if index:
            patch = stage.patch_embed.patch_size
            grid = (grid[0] // patch[0], grid[1] // patch[1])
        outside += grid[0] * grid[1] * (stage.patch_embed.proj.weight.numel() + stage.pos_embed.shape[-1])
        num_tokens = stage.num_prefix_tokens + grid[0] * grid[1]
        layers += [_reduced_layer_macs(block, num_tokens, grid) for block in stage.blocks]
        routed += [isinstance(block, DGEBlock) for block in stage.blocks]
    return ModelMacs(tuple(layers), tuple(routed), outside)


def token_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """The token grid (H, W) of a model's first block, for images [B, C, H, W].

    Raises:
        ValueError: The model is of a kind whose grid is not known.
    """
    if isinstance(model, PyramidVisionTransformer):
        embed: Any = model.stages[0].patch_embed
    elif isinstance(model, VisionTransformer):
        embed = model.patch_embed
    else:
        raise _unknown(model)
    rows, cols = embed.dynamic_feat_size((images.shape[2], images.shape[3]))
    return rows, cols


def _unknown(model: nn.Module) -> ValueError:
    return ValueError(
        f"model: got {type(model).__name__}; expected a vision transformer or pyramid (of a wrapper such as "
        "DDP, pass the module inside)"
    )


def _head_macs(model: VisionTransformer, num_tokens: int) -> int:
    heads = (getattr(model, name, None) for name in ("head", "head_dist"))
    macs = sum(head.in_features * head.out_features for head in heads if isinstance(head, nn.Linear))
    pool = model.attn_pool
    if pool is None:
        return macs
    if type(pool) is not AttentionPoolLatent:
        raise ValueError(f"model: pools with {type(pool).__name__}; MACs are known for AttentionPoolLatent")
    tokens = num_tokens if model.pool_include_prefix else num_tokens - model.num_prefix_tokens
    latents, width = pool.latent.shape[1], pool.kv.in_features
    inner = pool.num_heads * pool.head_dim
    attention = latents * tokens * (2 * inner + 3 * pool.num_heads)
    return (
        macs
        + tokens * width * 2 * inner
        + latents * (width * inner + inner * pool.proj.out_features + _mlp_macs(pool.mlp))
        + attention
    )


def model_macs(model: nn.Module, grid: tuple[int, int]) -> ModelMacs:
    """The MACs of a model as a function of its queries.

    Per block with N tokens, Q queries, C channels, h heads and hidden ratio m: norms NC + QC, queries QC²,
    keys and values 2NC², both attention products 2QNC, softmax 3QNh, output QC², MLP 2mQC² and its
    activation mQC; a routed block adds its router, C·(1 + n) per region. Outside the blocks: the patch
    embedding (all input channels and pixels of each patch) and the heads. Left out, as too small to matter:
    biases, residual sums, layer scale, the final norm, and norms of single heads or inside the MLP.

    A pyramid's block with reduction R has keys and values of N/R² tokens instead of N, and adds the strided
    convolution, NC², and the norm after it; its patch embeddings add their norms. The grids of later stages
    follow from the first one's.

    Source: Song et al., NeurIPS 2021, section 3.3, with the patch embedding and the second norm counted as
    they are executed.

    Args:
        model: timm's ``VisionTransformer`` or this package's pyramid, routed or not.
        grid: (H, W) of the first block's token grid.

    Raises:
        ValueError: The model, its patch embedding, pooling or MLP is of a kind whose MACs are not known.
    """
    if isinstance(model, PyramidVisionTransformer):
        return _pyramid_macs(model, grid)
    if not isinstance(model, VisionTransformer):
        raise _unknown(model)
    if not isinstance(model.patch_embed, PatchEmbed):
        raise ValueError(f"model: embeds with {type(model.patch_embed).__name__}; expected timm's PatchEmbed")
    num_tokens = model.num_prefix_tokens + grid[0] * grid[1]
    patches = grid[0] * grid[1] * model.patch_embed.proj.weight.numel()
    return ModelMacs(
        layers=tuple(_layer_macs(block, num_tokens, grid) for block in model.blocks),
        routed=tuple(isinstance(block, DGEBlock) for block in model.blocks),
        outside=patches + _head_macs(model, num_tokens),
    )


def count_from_routings(model: nn.Module, routings: Sequence[Routing], grid: tuple[int, int], batch: int) -> MacCount:
    """What :func:`count_macs` returns, from a forward pass that was already made."""
    macs = model_macs(model, grid)
    pending = iter(routings)
    rows = []
    for layer, routed in zip(macs.layers, macs.routed, strict=True):
        queries = next(pending).queries.detach().double() if routed else None
        if queries is None:
            rows.append(torch.full((batch,), float(layer.static), dtype=torch.float64))
        else:
            rows.append(queries.cpu() * layer.per_query + layer.fixed)
    layers = torch.stack(rows)
    return MacCount(
        layers=layers,
        static_layers=torch.tensor([float(layer.static) for layer in macs.layers], dtype=torch.float64),
        total=layers.sum(0) + macs.outside,
        static_total=float(macs.static),
    )


def count_macs(model: nn.Module, images: Tensor) -> MacCount:
    """Count the MACs that a model spends on images, in evaluation.

    Args:
        model: Of this package, or timm's ``VisionTransformer``; without routed blocks dynamic and static
            counts agree. Its training mode is restored.
        images: [B, C, H, W].

    Returns:
        The counts, on the CPU; :func:`model_macs` says what is counted.

    Raises:
        ValueError: The model's MACs are not known.
    """
    grid = token_grid(model, images)
    routings: list[Routing] = []
    if isinstance(model, RoutedModel):
        with evaluating(model), torch.no_grad():
            routings = model.forward_routed(images)[1]
    return count_from_routings(model, routings, grid, images.shape[0])
