"""What this package's versions of timm's transformers on one token grid share: embedding, and features of blocks."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any, cast

import torch.fx
from timm.models import register_notrace_function
from timm.models._features import feature_take_indices
from torch import Tensor

from dge_models import padding
from dge_models.canvas import StageTokens, at_own_sizes
from dge_models.position_cache import can_be_remembered, remembered

__all__ = ["SingleGridTransformer", "image_size", "intermediates_of", "refuse_masks", "whole_patches"]


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


# Checks look at values, which torch.fx (timm's graph feature extractors) can't trace through. It looks for timm's list
# of such functions where a model's `forward` is defined, and for its own where they are.
for _function in (image_size, whole_patches):
    register_notrace_function(_function)
torch.fx.wrap("image_size")
torch.fx.wrap("whole_patches")


class SingleGridTransformer(padding.FollowsPadding):
    """A transformer on one token grid whose blocks are run by :meth:`_run_blocks`.

    It stands in front of timm's class among the bases and takes that class's attributes: ``patch_embed``, ``blocks``,
    ``norm``, and so on.
    """

    patch_embed: Any
    blocks: Any
    norm: Any
    norm_pre: Any
    patch_drop: Any
    forward_head: Any
    _pos_embed: Any
    num_prefix_tokens: int
    grad_checkpointing: bool

    def _run_blocks(
        self,
        x: Tensor,
        grid: tuple[int, int],
        positions: Sequence[Any],
        *,
        keep: Container[int] = (),
        depth: int | None = None,
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Run blocks on all tokens.

        Args:
            x: [B, T + H·W, C].
            grid: (H, W).
            positions: From :meth:`_positions`, one per block.
            keep: Indices of blocks.
            depth: Run that many blocks; None means all.

        Returns:
            The tokens after them, what the blocks chose, and the tokens after each block in `keep`.
        """
        raise NotImplementedError

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """All tokens after the final norm, [B, T + H·W, C]; see :meth:`forward` for the arguments."""
        refuse_masks(attn_mask, is_causal)
        out: Tensor = at_own_sizes(self, self._features, x) if padding.in_use else self._features(x)
        return out

    def _features(self, images: Tensor) -> Tensor:
        x, grid, positions = self._embed(images)
        features: Tensor = self.norm(self._run_blocks(x, grid, positions)[0])
        return features

    def size_multiple(self) -> tuple[int, int]:
        """One patch."""
        rows, cols = self.patch_embed.patch_size
        return rows, cols

    def last_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The one that there is."""
        rows, cols = self.patch_embed.dynamic_feat_size(size)
        return rows, cols

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
        refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}; expected 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        depth = last + 1 if stop_early else None
        run = partial(self._block_outputs, take=take, depth=depth, norm=norm, features=not intermediates_only)
        features, kept = at_own_sizes(self, run, x) if padding.in_use else run(x)
        prefix = [each.tokens[:, : each.prefix] for each in kept]
        maps = [each.tokens[:, each.prefix :] for each in kept]
        if output_fmt == "NCHW":
            maps = [
                torch.unflatten(tokens, 1, each.grid).permute(0, 3, 1, 2).contiguous()
                for tokens, each in zip(maps, kept, strict=True)
            ]
        pairs = (maps, prefix if return_prefix_tokens and self.num_prefix_tokens > 0 else None)
        return intermediates_of(*pairs, lambda: cast(Tensor, features), intermediates_only, output_dict)

    def _block_outputs(
        self, images: Tensor, take: Container[int], depth: int | None, norm: bool, features: bool
    ) -> tuple[Tensor | None, list[StageTokens]]:
        """The last tokens after the final norm, if they are wanted, and the tokens after chosen blocks."""
        x, grid, positions = self._embed(images)
        x, _, kept = self._run_blocks(x, grid, positions, keep=take, depth=depth)
        kept = [self.norm(tokens) for tokens in kept] if norm else kept
        outputs = [StageTokens(tokens, grid, self.num_prefix_tokens) for tokens in kept]
        return self.norm(x) if features else None, outputs

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int], Sequence[Any]]:
        """Tokens [B, T + H·W, C] in front of the blocks, the grid (H, W) of these images, and :meth:`_positions`."""
        size = image_size(images)
        patch_embed = self.patch_embed
        grid = whole_patches(patch_embed.dynamic_feat_size(size), size, patch_embed.patch_size)
        x, positions = self._place(patch_embed(images), grid)
        return self.norm_pre(x), grid, positions

    def _place(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Sequence[Any]]:
        """Tokens [B, T + H·W, C] from embedded patches, and :meth:`_positions`."""
        x = self._with_positions(patches, grid)
        return x if self.patch_drop is None else self.patch_drop(x), self._positions(grid)

    def _with_positions(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """What timm's ``_pos_embed`` returns; what it adds to patches of another grid is remembered in evaluation."""
        if isinstance(patches, torch.fx.Proxy) or self.training or patches.ndim != 4:
            return cast(Tensor, self._pos_embed(patches))
        found = [getattr(self, name, None) for name in ("pos_embed", "cls_token", "reg_token", "dist_token")]
        parameters = [each for each in found if each is not None]
        own: tuple[int, int] = self.patch_embed.grid_size
        if found[0] is None or not can_be_remembered(parameters) or grid == own:
            return cast(Tensor, self._pos_embed(patches))
        # What it makes of zeros is what it adds, and the prefix tokens.
        zeros, prefix = patches.new_zeros(1, *patches.shape[1:]), self.num_prefix_tokens
        added = remembered(parameters, (own, grid, patches.dtype), partial(self._pos_embed, zeros))
        spatial = patches.flatten(1, 2) + added[:, prefix:]
        return torch.cat([added[:, :prefix].expand(len(patches), -1, -1), spatial], 1)

    def _positions(self, grid: tuple[int, int]) -> Sequence[Any]:
        """What each block needs to know of places beside the tokens, such as rotary embeddings; nothing here."""
        return [None] * len(self.blocks)


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask, is_causal: got a mask; expected none, pooled queries can't be masked")


def intermediates_of(
    maps: list[Tensor],
    prefix: list[Tensor] | None,
    features: Callable[[], Tensor],
    intermediates_only: bool,
    output_dict: bool,
) -> Any:
    """What timm's ``forward_intermediates`` returns, in each of its forms.

    Args:
        maps: The intermediates, formatted.
        prefix: The prefix tokens of each, or None to leave them out.
        features: Computes the features; only called if they are returned.
        intermediates_only: Leave the features out.
        output_dict: As a dict.
    """
    if output_dict:
        result: dict[str, Any] = {"image_intermediates": maps}
        if prefix is not None:
            result["image_intermediates_prefix"] = prefix
        return result if intermediates_only else {**result, "image_features": features()}
    intermediates: list[Any] = maps if prefix is None else list(zip(maps, prefix, strict=True))
    return intermediates if intermediates_only else (features(), intermediates)
