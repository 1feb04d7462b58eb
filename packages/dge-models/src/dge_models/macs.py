"""Multiply-accumulates of a model, per image and layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from dge_models import padding
from dge_models.canvas import at_own_sizes
from dge_models.encoder import DGEBlock
from dge_models.evaluating import evaluating
from dge_models.families import family_of
from dge_models.finding import find_model
from dge_models.projections import linear_shape, linear_shapes
from dge_models.routed import RoutedModel
from dge_models.routing import Routing, region_grid

__all__ = [
    "CountsMacs",
    "LayerMacs",
    "MacCount",
    "ModelMacs",
    "count_from_routings",
    "count_macs",
    "head_macs",
    "mlp_macs",
    "model_macs",
    "router_macs",
    "single_grid_macs",
    "token_grid",
]


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

    def count(self, layers: Tensor) -> MacCount:
        """The count of B images whose blocks computed `layers`, float64 [L, B]."""
        return MacCount(
            layers=layers,
            static_layers=torch.tensor([float(layer.static) for layer in self.layers], dtype=torch.float64),
            total=layers.sum(0) + self.outside,
            static_total=float(self.static),
        )


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of B images in a model of L blocks.

    Attributes:
        layers: float64 [L, B], what each block computed for each image, in network order, unrouted blocks
            included.
        static_layers: float64 [L], the same with every query computed.
        total: float64 [B], the whole model: blocks, patch embedding, head.
        static_total: The same with every query computed.

    Of images of several sizes, see :func:`dge_models.padded`, what is static is the mean over them.
    """

    layers: Tensor
    static_layers: Tensor
    total: Tensor
    static_total: float

    @classmethod
    def join_images(cls, parts: Sequence[MacCount], rows: Callable[..., Tensor]) -> MacCount:
        """One count from those of the images of one size each; `rows` puts images in the order of the batch."""
        layers, total = rows([part.layers for part in parts], 1), rows([part.total for part in parts])
        shares = [part.total.shape[0] / total.shape[0] for part in parts]
        static_layers = torch.stack([part.static_layers * share for part, share in zip(parts, shares, strict=True)])
        static_total = sum(part.static_total * share for part, share in zip(parts, shares, strict=True))
        return cls(layers, static_layers.sum(0), total, static_total)


@runtime_checkable
class CountsMacs(Protocol):
    """A model whose work depends on more than its routings."""

    def count_macs(self, images: Tensor) -> MacCount:
        """See :func:`count_macs`."""
        ...


def mlp_macs(mlp: nn.Module) -> int:
    """The MACs of an MLP per token, with one for each of its first layer's outputs; a ValueError if it has no layer."""
    shapes = list(linear_shapes(mlp))
    if not shapes:
        raise ValueError(f"model: an MLP of type {type(mlp).__name__} has no linear layer; its MACs are unknown")
    return sum(inputs * outputs for inputs, outputs in shapes) + shapes[0][1]


def router_macs(block: nn.Module, width: int, grid: tuple[int, int]) -> int:
    """The MACs of a block's router per image; 0 without one."""
    if not isinstance(block, DGEBlock):
        return 0
    rows, cols = region_grid(grid, block.router.splits)
    return rows * cols * width * (1 + len(block.router.splits))


def token_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """The token grid (H, W) of a model's first block, for images [B, C, H, W].

    Raises:
        ValueError: The model is of a kind whose grid is not known.
    """
    return family_of(model).token_grid(model, (images.shape[2], images.shape[3]))


def head_macs(head: nn.Module | None) -> int:
    """The MACs of a classifier per image; 0 of what is no linear layer."""
    shape = linear_shape(head)
    return 0 if shape is None else shape[0] * shape[1]


def _head_macs(model: Any, num_tokens: int) -> int:
    macs = sum(head_macs(getattr(model, name, None)) for name in ("head", "head_dist"))
    pool = model.attn_pool
    if pool is None:
        return macs
    if type(pool) is not AttentionPoolLatent:
        raise ValueError(f"model: pools with {type(pool).__name__}; MACs are known for AttentionPoolLatent")
    tokens = num_tokens if getattr(model, "pool_include_prefix", True) else num_tokens - model.num_prefix_tokens
    latents, width = pool.latent.shape[1], pool.kv.in_features
    inner = pool.num_heads * pool.head_dim
    attention = latents * tokens * (2 * inner + 3 * pool.num_heads)
    return (
        macs
        + tokens * width * 2 * inner
        + latents * (width * inner + inner * pool.proj.out_features + mlp_macs(pool.mlp))
        + attention
    )


def single_grid_macs(
    model: Any, grid: tuple[int, int], layer_macs: Callable[[Any, int, tuple[int, int]], LayerMacs]
) -> ModelMacs:
    """The MACs of a transformer on one token grid, with timm's names of its parts.

    Args:
        model: Patches, blocks and heads are counted.
        grid: (H, W).
        layer_macs: Counts a block, from the block, the number of its tokens, and the grid.

    Raises:
        ValueError: The patch embedding, the pooling or an MLP is of a kind whose MACs are not known.
    """
    if not isinstance(model.patch_embed, PatchEmbed):
        raise ValueError(f"model: embeds with {type(model.patch_embed).__name__}; expected timm's PatchEmbed")
    num_tokens = model.num_prefix_tokens + grid[0] * grid[1]
    patches = grid[0] * grid[1] * model.patch_embed.proj.weight.numel()
    return ModelMacs(
        layers=tuple(layer_macs(block, num_tokens, grid) for block in model.blocks),
        routed=tuple(isinstance(block, DGEBlock) for block in model.blocks),
        outside=patches + _head_macs(model, num_tokens),
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
    return family_of(model).model_macs(model, grid)


def count_from_routings(model: nn.Module, routings: Sequence[Routing], grid: tuple[int, int], batch: int) -> MacCount:
    """What :func:`count_macs` returns, from a forward pass that was already made."""
    if routings and routings[0].real_grids is not None:
        return _count_padded(model, routings)
    macs = model_macs(model, grid)
    pending = iter(routings)
    rows = []
    for layer, routed in zip(macs.layers, macs.routed, strict=True):
        queries = next(pending).queries.detach().double() if routed else None
        if queries is None:
            rows.append(torch.full((batch,), float(layer.static), dtype=torch.float64))
        else:
            rows.append(queries.cpu() * layer.per_query + layer.fixed)
    return macs.count(torch.stack(rows))


def _count_padded(model: nn.Module, routings: Sequence[Routing]) -> MacCount:
    """:func:`count_from_routings` of images of several sizes, one by one."""
    grids = routings[0].real_grids or ()
    counts = [
        count_from_routings(
            model,
            [replace(part, queries=part.queries[index : index + 1], real_grids=None) for part in routings],
            grid,
            1,
        )
        for index, grid in enumerate(grids)
    ]
    return MacCount.join_images(counts, lambda parts, dim=0: torch.cat(parts, dim))


def count_macs(model: nn.Module, images: Tensor) -> MacCount:
    """Count the MACs that a model spends on images, in evaluation.

    Args:
        model: Of this package, or timm's ``VisionTransformer``; without routed blocks dynamic and static
            counts agree. Or a module that holds one of them; the model is counted, not what is around it. Its
            training mode is restored.
        images: [B, C, H, W].

    Returns:
        The counts, on the CPU; :func:`model_macs` says what is counted.

    Raises:
        ValueError: The model's MACs are not known.
    """
    model = find_model(model)
    if padding.in_use and isinstance(model, padding.FollowsPadding):
        return at_own_sizes(model, partial(_count, model), images)
    return _count(model, images)


def _count(model: nn.Module, images: Tensor) -> MacCount:
    if isinstance(model, CountsMacs):
        with evaluating(model), torch.no_grad():
            return model.count_macs(images)
    grid = token_grid(model, images)
    routings: list[Routing] = []
    if isinstance(model, RoutedModel):
        with evaluating(model), torch.no_grad():
            routings = model.forward_routed(images)[1]
    return count_from_routings(model, routings, grid, images.shape[0])
