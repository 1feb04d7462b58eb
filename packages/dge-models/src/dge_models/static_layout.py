"""The static layout of a routed block: as many regions of each split in every image, chosen by worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dge_models.every_split import nested_means, pool_every_split
from dge_models.router import region_means
from dge_models.routing import count_queries, patch_sides, region_grid

__all__ = ["FixedLayout", "Places", "Pooled", "fixed_queries", "take_rows"]


@dataclass(frozen=True)
class Pooled:
    """What queries are taken from.

    Attributes:
        tables: Rows [B, M, C] that queries are taken from: where no region is clipped the tokens themselves, prefix
            tokens included, and the queries of all coarser splits; else one for all.
        means: float32 [B, ⌈H/S⌉, ⌈W/S⌉, C], the mean token of each region (float64 for float64 tokens).
    """

    tables: tuple[Tensor, ...]
    means: Tensor


@dataclass(frozen=True)
class Places:
    """Which queries are computed, and whom they stand for.

    Attributes:
        choice: int64 [B, ⌈H/S⌉, ⌈W/S⌉], the index of each region's split.
        sources: For each of the tables of :class:`Pooled`, the queries taken from it: int64 [B, F], places among the
            queries of :func:`pool_every_split`, prefix tokens first.
        row: int64 [B, T + H·W], for each token the row of the query that stands for it.
    """

    choice: Tensor
    sources: tuple[Tensor, ...]
    row: Tensor


def take_rows(table: Tensor, index: Tensor, first: int = 0) -> Tensor:
    """Rows of each image, as one lookup of whole rows.

    ``Tensor.gather`` would need an index for every channel, and runtimes move elements one by one then.

    Args:
        table: [B, M, C].
        index: int64 [B, K].
        first: What the index of row 0 is.

    Returns:
        [B, K, C].
    """
    images, rows = table.shape[:2]
    start = torch.arange(images, device=table.device).unsqueeze(1) * rows - first
    return F.embedding(index + start, table.flatten(0, 1))


def fixed_queries(counts: Sequence[int], grid: tuple[int, int], splits: tuple[int, ...], num_prefix_tokens: int) -> int:
    """The rows that a block computes per image with these counts; see :class:`FixedLayout` for the arguments."""
    most = sum(rows[count] for rows, count in zip(_most_queries(grid, splits), counts, strict=True))
    return num_prefix_tokens + min(most, grid[0] * grid[1])


@lru_cache(maxsize=256)
def _most_queries(grid: tuple[int, int], splits: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Per split, by how many regions have it: the most queries that they can have."""
    costs = count_queries(grid, splits, torch.device("cpu")).flatten(0, 1).long().sort(dim=0, descending=True).values
    return tuple((0, *each) for each in costs.cumsum(0).T.tolist())


class FixedLayout(nn.Module):
    """Gives a fixed number of regions to each split, those first for which it is worth most.

    The finest split goes to the regions whose logit for it exceeds their best other logit most, the next one to
    the best of the rest, and so on; of equal ones the first gets it. Where the counts are those of the largest
    logits, the result is their argmax.

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
    picks: Tensor
    earlier: Tensor
    rows_of: Tensor
    token: Tensor

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
        self.clipped = grid[0] % splits[0] > 0 or grid[1] % splits[0] > 0
        self.num_queries = fixed_queries(self.counts, grid, splits, num_prefix_tokens)
        for name, table in _tables(grid, splits, self.counts, num_prefix_tokens).items():
            self.register_buffer(name, table.to(device), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Compute the tables again, where timm's tools ask for it: after a move to uninitialised memory."""
        for name, table in _tables(self.grid, self.splits, self.counts, self.num_prefix_tokens).items():
            self.get_buffer(name).copy_(table)

    def reset_parameters(self) -> None:
        """The name under which weight initialisations look for it."""
        self.init_non_persistent_buffers()

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"counts={self.counts}, grid={self.grid}, num_queries={self.num_queries}"

    def pool(self, x: Tensor) -> Pooled:
        """Pool tokens for the router and for queries, in one pass where no region is clipped.

        The router needs the mean of every region. On the way there are the means of the smaller patches.

        Args:
            x: [B, T + H·W, C] tokens, prefix tokens first.
        """
        where = (self.grid, self.num_prefix_tokens)
        if self.clipped:
            spatial = torch.unflatten(x[:, self.num_prefix_tokens :], 1, self.grid)
            return Pooled((pool_every_split(x, *where, self.splits),), region_means(spatial, self.splits[0]))
        sides = patch_sides(self.splits)[1:]
        *coarse, means = nested_means(x, *where, (*sides, self.splits[0]))
        parts = [part.flatten(1, 2).to(x.dtype) for part in coarse]
        return Pooled((x, torch.cat(parts, dim=1)) if parts else (x,), means)

    def forward(self, logits: Tensor) -> Places:
        """Choose splits and lay out the queries.

        Args:
            logits: float32 [B, ⌈H/S⌉, ⌈W/S⌉, n].
        """
        rank = self._rank(logits.flatten(1, 2).transpose(1, 2))
        place = rank.long()
        choice, taken = torch.zeros_like(place), 0
        for count in self.counts[:-1]:
            taken += count
            choice = choice + (place >= taken)
        # The ranks are distinct, so every runtime sorts them alike.
        order = rank.topk(rank.shape[1], dim=1, largest=False).indices
        row = F.embedding(place, self.rows_of).flatten(1).index_select(1, self.token)
        cells = F.embedding(order, self.cells).flatten(1)
        if self.clipped:
            source, row = self._drop_outside(cells.index_select(1, self.picks), order, row)
            sources: tuple[Tensor, ...] = (source,)
        else:
            fine = self.num_prefix_tokens + self.counts[0] * self.splits[0] ** 2
            parts = (self.picks[:fine], self.picks[fine:])
            sources = tuple(cells.index_select(1, part) for part in parts[: len(self.splits)])
        return Places(torch.unflatten(choice, 1, logits.shape[1:3]), sources, row)

    def take(self, x: Tensor, pooled: Pooled, places: Places) -> Tensor:
        """The queries, [B, K, C], prefix tokens first, then finest ones first.

        Args:
            x: [B, T + H·W, C] tokens.
            pooled: Of these tokens.
            places: Of these tokens.
        """
        parts, first = [], 0
        for table, source in zip(pooled.tables, places.sources, strict=True):
            if source.shape[1]:
                parts.append(take_rows(table, source, first))
            first += table.shape[1]
        return torch.cat(parts, dim=1)

    def source(self, places: Places) -> Tensor:
        """The place of each row of :meth:`take` among the queries of :func:`pool_every_split`, int64 [B, K]."""
        return torch.cat(places.sources, dim=1)

    def _rank(self, logits: Tensor) -> Tensor:
        """The place of each region in the order in which splits are given out, float32 [B, R], from logits [B, n, R].

        Counting who comes before gives the ranks without a sort. Sorts of other runtimes promise nothing about equal
        values, and would need a scatter to tell who is taken.
        """
        regions, taken, rank = logits.shape[2], 0, None
        each = logits.split(1, dim=1)
        for split, count in enumerate(self.counts[:-1]):
            if count and taken + count < regions:
                other = each[split] - reduce(torch.maximum, each[split + 1 :])
                if rank is not None:
                    other = other.masked_fill(rank.unsqueeze(1) < taken, float("inf"))
                own = other.transpose(1, 2)
                before = (other > own) | ((other == own) & self.earlier)
                rank = before.float().sum(-1)
            taken += count
        if rank is None:
            return torch.arange(regions, device=logits.device).float().expand(logits.shape[0], -1)
        return rank

    def _drop_outside(self, source: Tensor, order: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Sources [B, F] and rows without the patches outside the grid, as far as all images can do without."""
        rows, kept = source.shape[1], self.num_queries
        if kept == rows:
            return source, row
        inside = F.embedding(order, self.inside).flatten(1).index_select(1, self.picks)
        first = torch.arange(rows, 0, -1, device=source.device)
        source = source.gather(1, (inside * rows + first).topk(kept, dim=1).indices)
        return source, (inside.cumsum(1) - 1).gather(1, row)


def _tables(
    grid: tuple[int, int], splits: tuple[int, ...], counts: Sequence[int], num_prefix_tokens: int
) -> dict[str, Tensor]:
    """Index tables of a grid.

    Returns:
        ``cells`` int64 [R, n·S² + T]: for each region the place of each patch of each split among the queries of all
        splits, for patches outside the grid that of another, and those of the prefix tokens; ``inside`` int64
        [R, n·S² + T], 1 for patches in the grid; ``picks`` int64, which of R·(n·S² + T) places are queries, regions
        in the order of their ranks; ``earlier`` bool [R, R], whether a region, the column, comes before another, the
        row; ``rows_of`` int64 [R, S² + T]: for each rank the rows that stand for its region's tokens and for the
        prefix tokens; ``token`` int64 [T + H·W], each token's place in R·(S² + T), regions in the order of the grid.
    """
    size, (region_rows, region_cols) = splits[0], region_grid(grid, splits)
    prefix, regions = torch.arange(num_prefix_tokens), region_rows * region_cols
    every, area = prefix.expand(regions, -1), size * size
    width = len(splits) * area + num_prefix_tokens
    region_y = torch.arange(region_rows).view(-1, 1, 1)
    region_x = torch.arange(region_cols).view(1, -1, 1)
    y, x = torch.arange(grid[0]).view(-1, 1), torch.arange(grid[1]).view(1, -1)
    of_y, of_x = torch.arange(size).view(-1, 1), torch.arange(size).view(1, -1)
    cells, inside, rows_of, picks = [], [], [], [len(splits) * area + prefix]
    offset, start, rank = num_prefix_tokens, num_prefix_tokens, 0
    for split, (k, side, count) in enumerate(zip(splits, patch_sides(splits), counts, strict=True)):
        rows, cols = -(-grid[0] // side), -(-grid[1] // side)
        patch = torch.arange(area).clamp(max=k * k - 1)
        down, across = region_y * k + patch // k, region_x * k + patch % k
        exists = (down < rows) & (across < cols)
        cells.append((offset + (down * cols + across) * exists).flatten(0, 1))
        inside.append(exists.flatten(0, 1).long())
        offset += rows * cols
        of_rank = torch.arange(count).view(-1, 1)
        rows_of.append(start + of_rank * (k * k) + (of_y // side * k + of_x // side).flatten())
        picks.append(((rank + of_rank) * width + split * area + torch.arange(k * k)).flatten())
        start, rank = start + count * k * k, rank + count
    local = (y // size * region_cols + x // size) * (area + num_prefix_tokens) + y % size * size + x % size
    return {
        "cells": torch.cat([*cells, every], dim=1),
        "inside": torch.cat([*inside, torch.ones_like(every)], dim=1),
        "picks": torch.cat(picks),
        "earlier": torch.ones(regions, regions, dtype=torch.bool).tril(-1),
        "rows_of": torch.cat([torch.cat(rows_of), every], dim=1),
        "token": torch.cat([area + prefix, local.flatten()]),
    }
