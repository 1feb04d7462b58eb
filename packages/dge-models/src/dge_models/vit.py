"""timm's vision transformers with routed blocks."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch.fx
from timm.models import checkpoint, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dge_models.encoder import DGEBlock, DropPathMode, TrainingMode
from dge_models.routed import RoutedModel, noise_per_block, routed_blocks, run_routed
from dge_models.routing import Routing

__all__ = ["DGEVisionTransformer", "DGEVisionTransformerDistilled", "route_blocks", "routed_blocks"]


def route_blocks(
    model: VisionTransformer,
    *,
    splits: tuple[int, ...],
    layers: Iterable[int] | None,
    training_mode: TrainingMode,
    drop_path_mode: DropPathMode,
) -> None:
    """Turn blocks of a vision transformer into routed ones, in place.

    Args:
        model: Whose ``blocks`` to change.
        splits: Queries per region side, finest first.
        layers: Indices of the blocks that route, negative ones from the end; None means all.
        training_mode: "dense" or "sparse".
        drop_path_mode: "query" or "image".

    Raises:
        ValueError: An index is out of range or occurs twice, tokens are dropped between the patch embedding
            and the blocks, the image is smaller than a patch, or a block can't be routed.
    """
    depth = len(model.blocks)
    wanted = list(range(depth)) if layers is None else [int(layer) for layer in layers]
    if any(not -depth <= layer < depth for layer in wanted):
        raise ValueError(f"layers: got {wanted}; expected indices of the model's {depth} blocks")
    wanted = [layer % depth for layer in wanted]
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"layers: got {wanted}; expected each block at most once")
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError("patch_drop_rate: got patch dropout; expected 0, regions need the whole token grid")
    grid = model.patch_embed.grid_size
    if grid is not None and min(grid) < 1:
        size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
        raise ValueError(f"img_size: got {size}; expected at least one patch of {patch}")
    for layer in sorted(wanted):
        model.blocks[layer] = DGEBlock.adopt(
            model.blocks[layer],
            f"blocks.{layer}",
            splits=splits,
            training_mode=training_mode,
            drop_path_mode=drop_path_mode,
        )


def image_size(images: Tensor) -> tuple[int, int]:
    """(H, W) of images [B, C, H, W], in pixels; a ValueError for other shapes."""
    if images.ndim != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}; expected [B, C, H, W]")
    return images.shape[2], images.shape[3]


def whole_patches(grid: tuple[int, int], size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """The token grid itself; a ValueError if an image of this size has no patch."""
    if min(grid) < 1:
        raise ValueError(f"images: got {size[0]} × {size[1]} pixels; expected at least one patch of {patch}")
    return grid


# Checks look at values, which torch.fx (timm's graph feature extractors) can't trace through. It finds only
# functions whose names have no underscore in front.
register_notrace_function(image_size)
register_notrace_function(whole_patches)


class _Routed(RoutedModel, VisionTransformer):
    """What both model classes add to timm's: a loop over the blocks, the grid handed in, routings out."""

    def __init__(
        self,
        *args: Any,
        splits: tuple[int, ...] = (4, 2, 1),
        layers: Iterable[int] | None = None,
        training_mode: TrainingMode = "dense",
        drop_path_mode: DropPathMode = "query",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        route_blocks(self, splits=splits, layers=layers, training_mode=training_mode, drop_path_mode=drop_path_mode)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        noise: Sequence[Tensor] | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Classify images.

        Args:
            x: [B, C, H, W] images.
            attn_mask: Not supported: a pooled query stands for several tokens.
            is_causal: Not supported, for the same reason.
            noise: As in :meth:`forward_routed`.
            return_routing: Return (logits, routings) instead of the logits. Through this argument the
                routings also come out of wrappers that know ``forward`` alone, such as DDP.

        Returns:
            What timm's model returns; with `return_routing` and one :class:`Routing` per routed block.

        Raises:
            ValueError: The images are not [B, C, H, W] or smaller than a patch, `noise` doesn't fit, or a
                mask is given.
        """
        # torch.fx passes a proxy for every argument; what has a default keeps it in the traced graph.
        if not isinstance(x, torch.fx.Proxy):
            _refuse_masks(attn_mask, is_causal)
        else:
            noise, return_routing = None, False
        x, grid = self._embed(x)
        x, routings, _ = self._run_blocks(x, grid, noise=noise, return_routing=return_routing)
        x = self.forward_head(self.norm(x))
        return (x, routings) if return_routing else x

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """All tokens after the final norm, [B, T + H·W, C]; see :meth:`forward` for the arguments."""
        _refuse_masks(attn_mask, is_causal)
        x, grid = self._embed(x)
        features: Tensor = self.norm(self._run_blocks(x, grid)[0])
        return features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Features of chosen blocks; arguments and results are those of timm's method of this name."""
        _refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}; expected 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        x, _, kept = self._run_blocks(x, grid, keep=take, depth=last + 1 if stop_early else None)
        kept = [self.norm(tokens) for tokens in kept] if norm else kept
        prefix = [tokens[:, : self.num_prefix_tokens] for tokens in kept]
        maps = [tokens[:, self.num_prefix_tokens :] for tokens in kept]
        if output_fmt == "NCHW":
            maps = [torch.unflatten(tokens, 1, grid).permute(0, 3, 1, 2).contiguous() for tokens in maps]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        intermediates: list[Any] = list(zip(maps, prefix, strict=True)) if with_prefix else maps
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, T + H·W, C] in front of the blocks, and the grid (H, W) that these images have."""
        size = image_size(images)
        patch_embed = self.patch_embed
        grid = whole_patches(patch_embed.dynamic_feat_size(size), size, patch_embed.patch_size)
        x = self._pos_embed(patch_embed(images))
        return self.norm_pre(self.patch_drop(x)), grid

    def _run_blocks(
        self,
        x: Tensor,
        grid: tuple[int, int],
        *,
        noise: Sequence[Tensor] | None = None,
        return_routing: bool = False,
        keep: Container[int] = (),
        depth: int | None = None,
    ) -> tuple[Tensor, list[Routing], list[Tensor]]:
        """Tokens after the first `depth` blocks, the routings, and the tokens after the blocks in `keep`."""
        pending = noise_per_block(noise, sum(isinstance(block, DGEBlock) for block in self.blocks))
        routings: list[Routing] = []
        kept: list[Tensor] = []
        blocks: Sequence[nn.Module] = list(self.blocks)
        for index, block in enumerate(blocks[:depth]):
            if isinstance(block, DGEBlock):
                x = run_routed(
                    block,
                    x,
                    grid,
                    self.num_prefix_tokens,
                    noise=next(pending),
                    return_routing=return_routing,
                    checkpointing=self.grad_checkpointing,
                )
                if return_routing:
                    x, routing = x
                    routings.append(routing)
            elif self.grad_checkpointing:
                x = checkpoint(block, x)
            else:
                x = block(x)
            if index in keep:
                kept.append(x)
        return x, routings, kept


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask, is_causal: got a mask; expected none, pooled queries can't be masked")


class DGEVisionTransformer(_Routed):
    """timm's ``VisionTransformer`` whose blocks route their queries.

    Everything else, parameter names included, is timm's.

    Args:
        *args: What timm's class takes.
        splits: Queries per region side, finest first; the first is the region's side in tokens.
        layers: Indices of the blocks that route; None means all. The others stay timm's.
        training_mode: "dense" or "sparse", see :class:`DGEBlock`.
        drop_path_mode: "query" or "image", see :class:`DGEBlock`.
        **kwargs: What timm's class takes.

    Raises:
        ValueError: As in :func:`route_blocks`.
    """


class DGEVisionTransformerDistilled(_Routed, VisionTransformerDistilled):
    """timm's ``VisionTransformerDistilled`` (two prefix tokens, two heads) whose blocks route their queries.

    See :class:`DGEVisionTransformer` for the arguments.
    """
