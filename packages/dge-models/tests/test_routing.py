from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dge_kernels import plan_queries
from dge_models.routing import (
    Routing,
    check_splits,
    count_queries,
    patch_sides,
    region_grid,
    straight_through,
)


@pytest.mark.parametrize("splits", [(4, 2, 1), (1,), (2, 1), (6, 3, 2, 1), (8,)])
def test_good_splits_are_taken_as_a_tuple(splits: tuple[int, ...]) -> None:
    assert check_splits(list(splits)) == splits


@pytest.mark.parametrize("splits", [(), (1, 2, 4), (4, 3), (4, 4), (4, 0), (4, -1), (4, 2.0), (True,)])
def test_bad_splits_are_refused_by_value(splits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="splits: got"):
        check_splits(splits)


def test_patch_sides_and_regions() -> None:
    assert patch_sides((4, 2, 1)) == (1, 2, 4)
    assert region_grid((5, 9), (4, 2, 1)) == (2, 3)


@pytest.mark.parametrize("grid", [(8, 12), (7, 7), (5, 9), (1, 1), (3, 10)])
@pytest.mark.parametrize("splits", [(4, 2, 1), (6, 3, 2, 1), (1,)])
def test_query_counts_are_those_of_a_plan(grid: tuple[int, int], splits: tuple[int, ...]) -> None:
    rows, cols = region_grid(grid, splits)
    choice = torch.randint(0, len(splits), (3, rows, cols))
    gate = torch.nn.functional.one_hot(choice, len(splits)).float()
    routing = Routing.from_gate(choice, gate, grid, 2, splits)
    plan = plan_queries(choice, splits, grid=grid, num_prefix_tokens=2)
    assert torch.equal(routing.queries.long(), plan.lengths.long())
    assert routing.choice.dtype == torch.uint8
    assert routing.num_tokens == 2 + grid[0] * grid[1]


def test_whole_regions_count_their_squared_split() -> None:
    counts = count_queries((8, 8), (4, 2, 1), torch.device("cpu"))
    assert torch.equal(counts, torch.tensor([16.0, 4.0, 1.0]).expand(2, 2, 3))


def test_straight_through_is_exactly_one_hot_with_the_gradient_of_softmax() -> None:
    logits = torch.randn(5, 4, 3, requires_grad=True)
    weights = torch.randn(5, 4, 3)

    def gradient(gate: Tensor) -> Tensor:
        return torch.autograd.grad((gate * weights).sum(), logits)[0]

    gate = straight_through(logits, logits.argmax(-1))
    assert set(gate.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(gate.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(gradient(gate), gradient(logits.softmax(-1)))
