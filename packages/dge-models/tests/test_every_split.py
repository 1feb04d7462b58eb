from __future__ import annotations

import pytest
import torch

from dge_kernels import plan_queries, pool_queries, unpool_queries
from dge_models.every_split import coarse_differences, every_patch, nested_means, pool_every_split, recombine
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


@pytest.mark.parametrize("grid", [(8, 12), (6, 9), (3, 5)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_patches_are_those_of_a_plan_with_one_split_everywhere(grid: tuple[int, int], prefix: int) -> None:
    splits = (4, 2, 1)
    patches = every_patch(grid, prefix, splits, torch.device("cpu"))
    shape = region_grid(grid, splits)
    start = prefix
    for split, k in enumerate(splits):
        choice = torch.full((1, *shape), split, dtype=torch.uint8)
        planned = plan_queries(choice, splits, grid=grid, num_prefix_tokens=prefix).patches[:, 1:].long()
        side = splits[0] // k
        count = -(-grid[0] // side) * -(-grid[1] // side)
        own = torch.cat([patches[:prefix], patches[start : start + count]])
        assert sorted(own.tolist()) == sorted(planned.tolist())
        assert own[prefix:].tolist() == sorted(own[prefix:].tolist())  # row by row, as the tokens
        start += count
    tokens = torch.zeros(1, prefix + grid[0] * grid[1], 1)
    assert start == len(patches) == pool_every_split(tokens, grid, prefix, splits).shape[1]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("splits", SPLITS)
def test_differences_are_those_of_the_whole_grid_at_one_split_and_the_next(
    grid: tuple[int, int], splits: tuple[int, ...]
) -> None:
    x = torch.randn(2, 1 + grid[0] * grid[1], 3)
    change = torch.randn_like(pool_every_split(x, grid, 1, splits))
    at_split = []
    for index in range(len(splits)):
        choice = torch.full((2, *region_grid(grid, splits)), index)
        gate = torch.nn.functional.one_hot(choice, len(splits)).float()
        routing = Routing.from_gate(choice, gate, grid, 1, splits)
        at_split.append(recombine(torch.zeros_like(x), change, routing)[:, 1:].unflatten(1, grid))
    differences = coarse_differences(change, grid, 1, splits)
    assert len(differences) == len(splits) - 1
    for difference, finer, coarser in zip(differences, at_split, at_split[1:], strict=False):
        torch.testing.assert_close(difference, coarser - finer)


@pytest.mark.parametrize("sides", [(2, 4), (1, 4), (2, 3, 6), (6,), (2, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_nested_means_are_the_means_of_patches(sides: tuple[int, ...], dtype: torch.dtype) -> None:
    grid, prefix = (12, 24), 2
    x = torch.randn(2, prefix + grid[0] * grid[1], 5, dtype=dtype)
    spatial = x[:, prefix:].unflatten(1, grid).double()
    for side, means in zip(sides, nested_means(x, grid, prefix, sides), strict=True):
        expected = spatial.unfold(1, side, side).unfold(2, side, side).mean((-2, -1))
        assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(means.double(), expected, atol=1e-6, rtol=1e-5)
