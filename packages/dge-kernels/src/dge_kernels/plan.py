"""The query plan: which patch of the token grid each packed query stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["QueryPlan", "region_grid", "region_size"]


def region_size(splits: tuple[int, ...]) -> int:
    """Tokens per side of a region: the largest split, since its queries stand for one token each."""
    return max(splits)


def region_grid(grid: tuple[int, int], splits: tuple[int, ...]) -> tuple[int, int]:
    """Regions per column and per row of a token grid.

    Args:
        grid: (H, W), in tokens.
        splits: Queries per region side, one entry per choice.

    Returns:
        (⌈H/S⌉, ⌈W/S⌉) for regions of S × S tokens; those at the bottom and right edge may be clipped.
    """
    size = region_size(splits)
    return -(-grid[0] // size), -(-grid[1] // size)


@dataclass(frozen=True)
class QueryPlan:
    """The packed queries of a batch of images, in the order that every operator of this package uses.

    Images follow each other; inside one, the prefix tokens come first, then the regions row by row, then
    the patches of a region row by row. The patches of an image cover each of its tokens exactly once.

    Plans come from :func:`dge_kernels.plan_queries`. One made by hand must keep these promises; the
    operators check on the CPU that it stays inside the tensors (RuntimeError) and skip what does not on CUDA.

    Attributes:
        patches: int32 [Q, 4]; image, y, x and side of each query's patch, in tokens. A negative y marks
            prefix token ``-y - 1``, whose x is 0 and whose side is 1. A patch that crosses the bottom or
            right edge of the grid stands for the tokens inside it.
        cu_seqlens: int32 [B + 1]; queries before each image, so image b owns rows
            ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        grid: (H, W), in tokens.
        num_prefix_tokens: T, the tokens per image in front of the grid (class token, registers).
        splits: Queries per region side, one entry per choice; the largest is the region's side in tokens.
        max_seqlen: The most queries that one image has.
    """

    patches: Tensor
    cu_seqlens: Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int
    splits: tuple[int, ...]
    max_seqlen: int

    @property
    def total(self) -> int:
        """Q, the number of queries in the batch."""
        return self.patches.shape[0]

    @property
    def batch_size(self) -> int:
        """B, the number of images."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """N = T + H·W, the tokens of one image."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def lengths(self) -> Tensor:
        """int32 [B]: the queries of each image."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    @property
    def device(self) -> torch.device:
        """Where the plan's tensors live."""
        return self.patches.device

    def to(self, device: torch.device | str) -> QueryPlan:
        """The same plan with its tensors on `device`."""
        return replace(self, patches=self.patches.to(device), cu_seqlens=self.cu_seqlens.to(device))
