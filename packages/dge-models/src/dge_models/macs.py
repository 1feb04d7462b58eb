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
from dge_models.routing import Routing, region_grid
from dge_models.vit import DGEVisionTransformer, DGEVisionTransformerDistilled

__all__ = ["LayerMacs", "MacCount", "ModelMacs", "count_from_routings", "count_macs", "model_macs"]


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
    if isinstance(block, DGEBlock):
        rows, cols = region_grid(grid, block.router.splits)
        fixed += rows * cols * width * (1 + len(block.router.splits))
    return LayerMacs(fixed, per_query, num_tokens)


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
    biases, residual sums, layer scale, the final norm, and norms inside attention and MLP.

    Source: Song et al., NeurIPS 2021, section 3.3, with the patch embedding and the second norm counted as
    they are executed.

    Args:
        model: timm's ``VisionTransformer``, routed or not.
        grid: (H, W) of the token grid.

    Raises:
        ValueError: The model, its patch embedding, pooling or MLP is of a kind whose MACs are not known.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"model: got {type(model).__name__}; expected a vision transformer (of a wrapper such as "
            "DDP, pass the module inside)"
        )
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
        model: Of this package, or timm's ``VisionTransformer`` (then dynamic and static counts agree). Its
            training mode is restored.
        images: [B, C, H, W].

    Returns:
        The counts, on the CPU; :func:`model_macs` says what is counted.

    Raises:
        ValueError: The model's MACs are not known.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"model: got {type(model).__name__}; expected a vision transformer")
    routings: list[Routing] = []
    if isinstance(model, (DGEVisionTransformer, DGEVisionTransformerDistilled)):
        with evaluating(model), torch.no_grad():
            routings = model.forward_routed(images)[1]
    grid = model.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
    return count_from_routings(model, routings, grid, images.shape[0])
