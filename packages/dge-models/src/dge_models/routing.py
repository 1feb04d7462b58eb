"""What a router decides, as a value: the split of every region and the queries that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Routing", "check_splits", "count_queries", "patch_sides", "query_costs", "region_grid", "straight_through"]


@dataclass(frozen=True)
class Routing:
    """The routing of one layer for a batch of B images.

    Attributes:
        choice: uint8 [B, Hr, Wr], the index into `splits` that each region got; 0 is the finest split.
        gate: float32 [B, Hr, Wr, n], one-hot of `choice`. Where gradients are recorded its backward is the
            softmax's (straight-through), and so it carries the gradient to the router.
        queries: float32 [B], queries per image, prefix tokens included; differentiable through `gate`.
        grid: (H, W) of the token grid. Regions are S × S tokens, S the largest split; Hr = ⌈H/S⌉, Wr = ⌈W/S⌉.
        num_prefix_tokens: Tokens per image in front of the grid, each one a query of its own.
        splits: Queries per region side, finest first.
        logits: float32 [B, Hr, Wr, n], the router's logits before noise, without gradient; None where the
            routing came from the fused inference kernel. Their argmax is what routing without noise chooses.
        real_grids: (H, W) per image of its own tokens, at the top left of the grid, where images were padded to one
            size, see :func:`dge_models.padded`; None where every token is an image's own. Regions outside them were not
            computed: they have the coarsest split, no queries, and no part in any mean.
    """

    choice: Tensor
    gate: Tensor
    queries: Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int
    splits: tuple[int, ...]
    logits: Tensor | None = None
    real_grids: tuple[tuple[int, int], ...] | None = None

    @property
    def num_tokens(self) -> int:
        """N, the tokens of one image, and its queries with every region at the finest split."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def real_regions(self) -> Tensor | None:
        """bool [B, Hr, Wr], which regions have tokens of an image; None where all have."""
        if self.real_grids is None:
            return None
        device, (rows, cols) = self.choice.device, self.choice.shape[1:]
        own = torch.tensor([region_grid(grid, self.splits) for grid in self.real_grids], device=device)
        down = torch.arange(rows, device=device) < own[:, :1]
        across = torch.arange(cols, device=device) < own[:, 1:]
        return down.unsqueeze(2) & across.unsqueeze(1)

    @property
    def split_shares(self) -> Tensor:
        """float32 [n], what share of the images' regions each split got; without gradient."""
        gate, own = self.gate.detach().float(), self.real_regions
        return gate.mean((0, 1, 2)) if own is None else gate[own].mean(0)

    @classmethod
    def from_gate(
        cls,
        choice: Tensor,
        gate: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        splits: tuple[int, ...],
        logits: Tensor | None = None,
    ) -> Routing:
        """Count the queries that a choice of splits costs.

        Args:
            choice: Integer [B, Hr, Wr].
            gate: float32 [B, Hr, Wr, n], one-hot of `choice` in value.
            grid: (H, W) of the token grid.
            num_prefix_tokens: Tokens per image in front of the grid.
            splits: Queries per region side, finest first.
            logits: float32 [B, Hr, Wr, n] before noise, if known.
        """
        cost = count_queries(grid, splits, gate.device)
        queries = (gate * cost).sum((1, 2, 3)) + num_prefix_tokens
        return cls(choice.to(torch.uint8), gate, queries, grid, num_prefix_tokens, splits, logits)


def check_splits(splits: Sequence[int]) -> tuple[int, ...]:
    """Validate a split set.

    Args:
        splits: Queries per region side, finest first, such as (4, 2, 1). The first is also the side of a
            region in tokens, so each must divide it.

    Returns:
        The splits as a tuple of ints.

    Raises:
        ValueError: `splits` is empty, not strictly decreasing, not positive, or not all divide the first.
    """
    values = tuple(splits)
    rule = "expected positive integers, strictly decreasing, each dividing the first, such as (4, 2, 1)"
    if not values or any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in values):
        raise ValueError(f"splits: got {splits!r}; {rule}")
    if any(b >= a for a, b in pairwise(values)) or any(values[0] % k for k in values):
        raise ValueError(f"splits: got {splits!r}; {rule}")
    return values


def region_grid(grid: tuple[int, int], splits: tuple[int, ...]) -> tuple[int, int]:
    """Regions per column and per row of a token grid: (⌈H/S⌉, ⌈W/S⌉)."""
    return -(-grid[0] // splits[0]), -(-grid[1] // splits[0])


def patch_sides(splits: tuple[int, ...]) -> tuple[int, ...]:
    """The side, in tokens, of the patch that one query stands for, per split: S / k."""
    return tuple(splits[0] // k for k in splits)


def count_queries(grid: tuple[int, int], splits: tuple[int, ...], device: torch.device) -> Tensor:
    """Queries of each region at each split, patches that lie outside the grid left out.

    Args:
        grid: (H, W) of the token grid.
        splits: Queries per region side, finest first.
        device: Where to put the result.

    Returns:
        float32 [⌈H/S⌉, ⌈W/S⌉, n]; k² for a region that the grid's edge does not clip.
    """

    def patches_along(length: int, regions: int) -> Tensor:
        start = torch.arange(regions, device=device) * splits[0]
        extent = (length - start).clamp(max=splits[0])
        return torch.stack([(extent + side - 1) // side for side in patch_sides(splits)], -1)

    rows, cols = region_grid(grid, splits)
    down, across = patches_along(grid[0], rows), patches_along(grid[1], cols)
    return (down.unsqueeze(1) * across.unsqueeze(0)).float()


def query_costs(routing: Routing) -> Tensor:
    """Queries of each region at each split, as :func:`count_queries` gives them for the images' own grids.

    Returns:
        float32 [⌈H/S⌉, ⌈W/S⌉, n]; of padded images [B, ⌈H/S⌉, ⌈W/S⌉, n], zero outside an image.
    """
    device = routing.gate.device
    if routing.real_grids is None:
        return count_queries(routing.grid, routing.splits, device)
    rows, cols = region_grid(routing.grid, routing.splits)
    own = {grid: count_queries(grid, routing.splits, device) for grid in dict.fromkeys(routing.real_grids)}
    whole = {grid: F.pad(cost, (0, 0, 0, cols - cost.shape[1], 0, rows - cost.shape[0])) for grid, cost in own.items()}
    return torch.stack([whole[grid] for grid in routing.real_grids])


def straight_through(logits: Tensor, choice: Tensor) -> Tensor:
    """One-hot of `choice` in the forward pass, softmax of `logits` in the backward pass.

    The difference added to the one-hot is exactly zero, so the forward value is exactly 0 or 1.

    Args:
        logits: float32 [..., n].
        choice: Integer [...], an index into the last axis.

    Returns:
        float32 [..., n].
    """
    soft = logits.softmax(-1)
    hard = F.one_hot(choice.long(), logits.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())
