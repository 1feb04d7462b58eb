from __future__ import annotations

import pytest
import torch

from dge_models.dense import pool_every_split
from dge_models.fixed_layout import FixedLayout
from dge_models.routing import count_queries, region_grid


def counts_of(logits: torch.Tensor) -> tuple[int, ...]:
    return tuple(logits.argmax(-1).flatten().bincount(minlength=logits.shape[-1]).tolist())


@pytest.mark.parametrize("splits", [(4, 2, 1), (4, 1), (2, 1), (1,)])
@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (3, 5)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_every_token_reads_the_query_of_its_own_patch(
    grid: tuple[int, int], splits: tuple[int, ...], prefix: int
) -> None:
    logits = torch.randn(1, *region_grid(grid, splits), len(splits))
    layout = FixedLayout(counts_of(logits), grid, splits, prefix)
    choice, source, row = layout(logits)
    assert torch.equal(choice, logits.argmax(-1))
    assert source.shape == (1, layout.num_queries)
    tokens = torch.randn(1, prefix + grid[0] * grid[1], 3)
    queries = pool_every_split(tokens, grid, prefix, splits)
    read = queries[:, source[0]][:, row[0]]
    size = splits[0]
    for index in range(tokens.shape[1]):
        if index < prefix:
            torch.testing.assert_close(read[0, index], tokens[0, index])
            continue
        y, x = divmod(index - prefix, grid[1])
        side = size // splits[int(choice[0, y // size, x // size])]
        top, left = y // side * side, x // side * side
        patch = tokens[0, prefix:].unflatten(0, grid)[top : top + side, left : left + side]
        torch.testing.assert_close(read[0, index], patch.mean((0, 1)))


@pytest.mark.parametrize("grid", [(8, 12), (7, 10)])
def test_room_is_made_for_the_most_queries_and_no_more_than_tokens(grid: tuple[int, int]) -> None:
    cost = count_queries(grid, (4, 2, 1), torch.device("cpu"))
    for counts in ((6, 0, 0), (0, 0, 6), (2, 3, 1), (0, 5, 1)):
        layout = FixedLayout(counts, grid, (4, 2, 1), 1)
        needed = []
        for _ in range(20):
            choice = layout(torch.randn(1, 2, 3, 3))[0]
            needed.append(1 + int(cost.gather(-1, choice[0].unsqueeze(-1)).sum()))
        assert max(needed) <= layout.num_queries <= 1 + grid[0] * grid[1]
        if grid == (8, 12):
            assert set(needed) == {layout.num_queries}


def test_fine_splits_go_where_they_are_worth_most() -> None:
    logits = torch.zeros(2, 1, 4, 3)
    logits[0, 0, :, 0] = torch.tensor([1.0, 4.0, 3.0, 2.0])
    logits[1, 0, :, 0] = torch.tensor([9.0, 0.0, 5.0, 7.0])
    logits[:, 0, :, 1] = torch.tensor([0.5, 0.1, 0.2, 0.9])
    choice = FixedLayout((1, 2, 1), (4, 16), (4, 2, 1), 0)(logits)[0]
    # After the best finest split, the best of the rest at the second; the first image's region 1, the second's 0.
    assert choice.squeeze(1).tolist() == [[1, 0, 2, 1], [0, 2, 1, 1]]


@pytest.mark.parametrize("counts", [(1, 2), (1, 2, 3), (5, -1, 0), (4, 0, 0, 0)])
def test_counts_that_do_not_fit_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"counts: got .*; expected 3 numbers of regions, .* add up to 4, .* 8 × 8"):
        FixedLayout(counts, (8, 8), (4, 2, 1), 1)
