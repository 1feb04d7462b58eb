"""One stage of a pyramid: a patch embedding, a position embedding, and its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch.fx
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.layers.weight_init import trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from dge_models.encoder import DGEBlock
from dge_models.position_cache import remembered
from dge_models.routed import run_routed
from dge_models.routing import Routing

__all__ = ["NewBlock", "PyramidStage", "resize_positions", "spatial_map"]

NewBlock = Callable[..., nn.Module]
"""Makes a block from its width and the keywords ``drop_path``, ``device`` and ``dtype``."""


def spatial_map(tokens: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """The spatial tokens as a map: [B, T + H·W, C] becomes [B, C, H, W], prefix tokens left out."""
    return torch.unflatten(tokens[:, num_prefix_tokens:], 1, [grid[0], grid[1]]).permute(0, 3, 1, 2)


def resize_positions(
    embedding: Tensor, stored: tuple[int, int], wanted: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """Interpolate a position embedding bilinearly to another grid; prefix tokens keep theirs.

    In evaluation the result is remembered, see :func:`dge_models.position_cache.remembered`.

    Args:
        embedding: [1, T + H·W, C].
        stored: (H, W), the grid that it was learned for.
        wanted: (H', W').
        num_prefix_tokens: T.

    Returns:
        [1, T + H'·W', C]; `embedding` itself if the grids agree.
    """
    if stored[0] == wanted[0] and stored[1] == wanted[1]:
        return embedding
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _interpolated(embedding, stored, wanted, num_prefix_tokens)
    else:
        compute = partial(_interpolated, embedding, stored, wanted, num_prefix_tokens)
        return remembered([embedding], (tuple(stored), tuple(wanted), num_prefix_tokens), compute)


def _interpolated(
    embedding: Tensor, stored: tuple[int, int], wanted: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    spatial = spatial_map(embedding, stored, num_prefix_tokens).float()
    spatial = F.interpolate(spatial, [wanted[0], wanted[1]], mode="bilinear", align_corners=False)
    spatial = spatial.flatten(2).transpose(1, 2).to(embedding.dtype)
    return torch.cat([embedding[:, :num_prefix_tokens], spatial], dim=1)


def map_size(x: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """The token grid of a map [B, C, H, W]: whole patches only."""
    return x.shape[2] // patch_size[0], x.shape[3] // patch_size[1]


# They look at values or take a grid apart, which torch.fx can't trace through.
torch.fx.wrap("spatial_map")
torch.fx.wrap("resize_positions")
torch.fx.wrap("map_size")


class PyramidStage(nn.Module):
    """Embeds an image or the previous stage's map, and runs its blocks.

    Args:
        grid_size: (H, W), the grid that the position embedding is learned for.
        in_chans: Channels of the input.
        dim: C, the tokens' width.
        depth: Blocks.
        new_block: Makes a block.
        patch_size: Input pixels per side of a token.
        class_token: Put a class token in front.
        drop_path: One rate per block.
        pos_drop: Dropout after the position embedding.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        grid_size: tuple[int, int],
        in_chans: int,
        dim: int,
        depth: int,
        new_block: NewBlock,
        *,
        patch_size: int,
        class_token: bool,
        drop_path: Sequence[float],
        pos_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grid_size = grid_size
        self.num_prefix_tokens = int(class_token)
        self.grad_checkpointing = False
        # No size: this embedding takes any, and leaves out what is no whole patch.
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.patch_embed = PatchEmbed(None, patch_size, in_chans, dim, norm_layer=norm, strict_img_size=False, **dd)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, **dd)) if class_token else None
        tokens = self.num_prefix_tokens + grid_size[0] * grid_size[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.ModuleList(new_block(dim, drop_path=drop_path[index], **dd) for index in range(depth))

    def reset_parameters(self) -> None:
        """Draw the position embedding and the class token (those of the modules inside are not touched)."""
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def set_grid_size(self, grid: tuple[int, int]) -> None:
        """Resize the position embedding for good, to start from for other input sizes."""
        with torch.no_grad():
            resized = resize_positions(self.pos_embed, self.grid_size, grid, self.num_prefix_tokens).clone()
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        self.grid_size = grid

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens in front of the blocks.

        Args:
            x: [B, C', H', W'], an image or the previous stage's map.

        Returns:
            [B, T + H·W, C] tokens, class token first, and (H, W).
        """
        grid = map_size(x, self.patch_embed.patch_size)
        tokens = self.patch_embed(x)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        positions = resize_positions(self.pos_embed, self.grid_size, grid, self.num_prefix_tokens)
        return self.pos_drop(tokens + positions), grid

    def run_plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens as from :meth:`forward`, and their map, without routing: what TorchScript compiles."""
        tokens, grid = self.embed(x)
        for block in self.blocks:
            tokens = block(tokens, grid, self.num_prefix_tokens)
        return tokens, spatial_map(tokens, grid, self.num_prefix_tokens)

    @torch.jit.unused
    def forward(
        self, x: Tensor, *, noise: Iterable[Tensor | None] = (), return_routing: bool = False
    ) -> tuple[Tensor, tuple[int, int], list[Routing]]:
        """Run the stage.

        Args:
            x: [B, C', H', W'], an image or the previous stage's map.
            noise: One item per routed block, taken as they are needed; None (and what is missing) is drawn.
            return_routing: Collect the routings.

        Returns:
            [B, T + H·W, C] tokens, (H, W), and with `return_routing` one routing per routed block.
        """
        pending = iter(noise)
        routings: list[Routing] = []
        tokens, grid = self.embed(x)
        for block in self.blocks:
            if isinstance(block, DGEBlock):
                tokens = run_routed(
                    block,
                    tokens,
                    grid,
                    self.num_prefix_tokens,
                    noise=next(pending, None),
                    return_routing=return_routing,
                    checkpointing=self.grad_checkpointing,
                )
                if return_routing:
                    tokens, routing = tokens
                    routings.append(routing)
            elif self.grad_checkpointing:
                tokens = checkpoint(block, tokens, grid, self.num_prefix_tokens)
            else:
                tokens = block(tokens, grid, self.num_prefix_tokens)
        return tokens, grid, routings
