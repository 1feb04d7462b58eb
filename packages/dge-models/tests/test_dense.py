from __future__ import annotations

import pytest
import torch

from dge_kernels import plan_queries, pool_queries, unpool_queries
from dge_models.dense import pool_every_split, recombine
from dge_models.routing import Routing, region_grid

GRIDS = [(8, 12), (7, 7), (5, 9), (1, 2)]
SPLITS = [(4, 2, 1), (6, 3, 2, 1), (2,)]


def _plan(grid: tuple[int, int], splits: tuple[int, ...], index: int):
    choice = torch.full((2, *region_grid(grid, splits)), index)
    return plan_queries(choice, splits, grid=grid, num_prefix_tokens=1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("splits", SPLITS)
def test_pooling_gives_every_split_the_queries_of_its_plan(grid: tuple[int, int], splits: tuple[int, ...]) -> None:
    x = torch.randn(2, 1 + grid[0] * grid[1], 3)
    pooled = pool_every_split(x, grid, 1, splits)
    start = 1
    for index in range(len(splits)):
        queries = pool_queries(x, _plan(grid, splits, index)).view(2, -1, 3)
        assert torch.equal(pooled[:, :1], queries[:, :1])
        count = queries.shape[1] - 1
        part = pooled[:, start : start + count]
        # A plan lists patches region by region, the dense mode row by row: compare them as sets.
        torch.testing.assert_close(part.sort(1).values, queries[:, 1:].sort(1).values)
        start += count
    assert pooled.shape[1] == start


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("splits", SPLITS)
def test_recombining_gives_each_region_the_change_of_its_split(grid: tuple[int, int], splits: tuple[int, ...]) -> None:
    x = torch.randn(2, 1 + grid[0] * grid[1], 3)
    choice = torch.randint(0, len(splits), (2, *region_grid(grid, splits)))
    gate = torch.nn.functional.one_hot(choice, len(splits)).float()
    routing = Routing.from_gate(choice, gate, grid, 1, splits)
    # With a change that is the pooled token itself, both ways can be compared through the token grid.
    plan = plan_queries(choice, splits, grid=grid, num_prefix_tokens=1)
    expected = unpool_queries(pool_queries(x, plan), plan, x)
    torch.testing.assert_close(recombine(x, pool_every_split(x, grid, 1, splits), routing), expected)


def test_every_gate_gets_a_gradient() -> None:
    grid, splits = (8, 8), (4, 2, 1)
    choice = torch.zeros(1, 2, 2, dtype=torch.long)
    gate = torch.nn.functional.one_hot(choice, 3).float().requires_grad_()
    x = torch.randn(1, 65, 4)
    out = recombine(x, pool_every_split(x, grid, 1, splits), Routing.from_gate(choice, gate, grid, 1, splits))
    (out * torch.randn_like(out)).sum().backward()
    assert gate.grad is not None
    assert (gate.grad != 0).all()
