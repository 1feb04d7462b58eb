"""The static layout of a routed block: as many regions of each split in every image, chosen by worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dge_models.routing import count_queries, patch_sides, region_grid

__all__ = ["FixedLayout"]


class FixedLayout(nn.Module):
    """Gives a fixed number of regions to each split, those first for which it is worth most.

    The finest split goes to the regions whose logit for it exceeds their best other logit most, the next one to
    the best of the rest, and so on. Where the counts are those of the largest logits, the result is their argmax.

    Every shape is known beforehand and every operator is plain PyTorch, so the result exports to ONNX and
    TensorRT and can be recorded in a CUDA graph. On a grid whose edge clips regions, room is made for the most
    queries that these counts can have; rows that are not needed repeat others, and nobody reads their result.

    Args:
        counts: Regions per split, finest first.
        grid: (H, W) of the token grid.
        splits: Queries per region side, finest first.
        num_prefix_tokens: T.
        device: Of the index tables.

    Attributes:
        num_queries: K, rows that a block computes per image, prefix tokens included.

    Raises:
        ValueError: `counts` are not one non-negative number per split that add up to the regions of the grid.
    """

    cells: Tensor
    inside: Tensor
    region: Tensor
    local: Tensor

    def __init__(
        self,
        counts: Sequence[int],
        grid: tuple[int, int],
        splits: tuple[int, ...],
        num_prefix_tokens: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        rows, cols = region_grid(grid, splits)
        self.counts = tuple(int(count) for count in counts)
        if len(self.counts) != len(splits) or min(self.counts) < 0 or sum(self.counts) != rows * cols:
            raise ValueError(
                f"counts: got {tuple(counts)}; expected {len(splits)} numbers of regions, one per split of {splits}, "
                f"that add up to {rows * cols}, the regions of a {grid[0]} × {grid[1]} grid"
            )
        self.grid, self.splits, self.num_prefix_tokens = grid, splits, num_prefix_tokens
        self.rows = sum(count * k * k for count, k in zip(self.counts, splits, strict=True))
        cost = count_queries(grid, splits, torch.device("cpu")).flatten(0, 1).long()
        most = sum(int(cost[:, s].sort(descending=True).values[:count].sum()) for s, count in enumerate(self.counts))
        self.num_queries = num_prefix_tokens + min(most, grid[0] * grid[1])
        for name, table in _tables(grid, splits, num_prefix_tokens).items():
            self.register_buffer(name, table.to(device), persistent=False)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"counts={self.counts}, grid={self.grid}, num_queries={self.num_queries}"

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose splits and lay out the queries.

        Args:
            logits: float32 [B, ⌈H/S⌉, ⌈W/S⌉, n].

        Returns:
            The choice, int64 [B, ⌈H/S⌉, ⌈W/S⌉]; for each of K rows its place among the queries of
            :func:`pool_every_split`, int64 [B, K]; and for each token the row of the query that stands for it,
            int64 [B, T + H·W].
        """
        batch, shape = logits.shape[0], logits.shape[1:3]
        choice, first, source, inside = self._place_regions(logits.flatten(1, 2))
        region = self.region.expand(batch, -1)
        split = choice.gather(1, region)
        row = first.gather(1, region) + self.local.expand(batch, -1, -1).gather(2, split.unsqueeze(-1)).squeeze(-1)
        kept = self.num_queries - self.num_prefix_tokens
        if kept < self.rows:  # clipped regions: drop the patches outside, as far as all images can
            order = torch.arange(self.rows, device=logits.device)
            source = source.gather(1, (inside * (2 * self.rows) - order).topk(kept, dim=1).indices)
            row = (inside.cumsum(1) - 1).gather(1, row)
        prefix = torch.arange(self.num_prefix_tokens, device=logits.device).expand(batch, -1)
        source = torch.cat([prefix, source], dim=1)
        return choice.unflatten(1, shape), source, torch.cat([prefix, row + self.num_prefix_tokens], dim=1)

    def _place_regions(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choice [B, R], first row of each region [B, R], and source and validity of all rows [B, rows]."""
        batch, regions = logits.shape[:2]
        choice = torch.zeros(batch, regions, dtype=torch.long, device=logits.device)
        first = torch.zeros_like(choice)
        taken = torch.zeros_like(choice, dtype=torch.bool)
        sources, insides, start = [], [], 0
        for split, (count, k) in enumerate(zip(self.counts, self.splits, strict=True)):
            if count == 0:
                continue
            rest = logits[..., split + 1 :]
            worth = logits[..., split] - rest.amax(-1) if rest.shape[-1] else torch.zeros_like(logits[..., split])
            chosen = worth.masked_fill(taken, float("-inf")).topk(count, dim=1).indices
            rows = start + k * k * torch.arange(count, device=logits.device)
            first = first.scatter(1, chosen, rows.expand(batch, -1))
            choice = choice.scatter(1, chosen, torch.full_like(chosen, split))
            taken = taken.scatter(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
            sources.append(self.cells[split, :, : k * k][chosen].flatten(1))
            insides.append(self.inside[split, :, : k * k][chosen].flatten(1))
            start += count * k * k
        return choice, first, torch.cat(sources, dim=1), torch.cat(insides, dim=1)


def _tables(grid: tuple[int, int], splits: tuple[int, ...], num_prefix_tokens: int) -> dict[str, Tensor]:
    """Index tables of a grid.

    Returns:
        ``cells`` int64 [n, R, S²]: the place of each patch of each region among the queries of all splits, for
        patches outside the grid that of another; ``inside`` int64 [n, R, S²], 1 for patches in the grid;
        ``region`` int64 [H·W], each token's region; ``local`` int64 [H·W, n], each token's patch in its region.
    """
    size, (region_rows, region_cols) = splits[0], region_grid(grid, splits)
    region_y = torch.arange(region_rows).view(-1, 1, 1)
    region_x = torch.arange(region_cols).view(1, -1, 1)
    y = torch.arange(grid[0]).view(-1, 1).expand(grid).flatten()
    x = torch.arange(grid[1]).view(1, -1).expand(grid).flatten()
    cells, inside, local, offset = [], [], [], num_prefix_tokens
    for k, side in zip(splits, patch_sides(splits), strict=True):
        rows, cols = -(-grid[0] // side), -(-grid[1] // side)
        patch = torch.arange(size * size).clamp(max=k * k - 1)
        down, across = region_y * k + patch // k, region_x * k + patch % k
        exists = (down < rows) & (across < cols)
        cells.append((offset + (down * cols + across) * exists).flatten(0, 1))
        inside.append(exists.flatten(0, 1).long())
        local.append(y % size // side * k + x % size // side)
        offset += rows * cols
    region = y // size * region_cols + x // size
    return {
        "cells": torch.stack(cells),
        "inside": torch.stack(inside),
        "region": region,
        "local": torch.stack(local, dim=1),
    }
