from __future__ import annotations

import pytest
import torch

from dge_models.every_split import pool_every_split
from dge_models.routing import count_queries, region_grid
from dge_models.static_layout import FixedLayout, fixed_queries, take_rows


def counts_of(logits: torch.Tensor) -> tuple[int, ...]:
    return tuple(logits.argmax(-1).flatten().bincount(minlength=logits.shape[-1]).tolist())


def plain_choice(logits: torch.Tensor, counts: tuple[int, ...]) -> list[int]:
    """One image's splits from logits [R, n]: to each split the best of the regions that are left, first ones first."""
    scores, left = logits.tolist(), list(range(len(logits)))
    choice = [len(counts) - 1] * len(left)
    for split, count in enumerate(counts[:-1]):
        left.sort(key=lambda region: (max(scores[region][split + 1 :]) - scores[region][split], region))
        for region in left[:count]:
            choice[region] = split
        left = left[count:]
    return choice


@pytest.mark.parametrize("splits", [(4, 2, 1), (4, 1), (2, 1), (4, 2), (1,)])
@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (3, 5)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_every_token_reads_the_query_of_its_own_patch(
    grid: tuple[int, int], splits: tuple[int, ...], prefix: int
) -> None:
    logits = torch.randn(1, *region_grid(grid, splits), len(splits))
    layout = FixedLayout(counts_of(logits), grid, splits, prefix)
    places = layout(logits)
    assert torch.equal(places.choice, logits.argmax(-1))
    assert places.row.shape == (1, prefix + grid[0] * grid[1])
    tokens = torch.randn(1, prefix + grid[0] * grid[1], 3)
    queries = layout.take(tokens, layout.pool(tokens), places)
    assert queries.shape == (1, layout.num_queries, 3)
    read = take_rows(queries, places.row)
    size = splits[0]
    for index in range(tokens.shape[1]):
        if index < prefix:
            torch.testing.assert_close(read[0, index], tokens[0, index])
            continue
        y, x = divmod(index - prefix, grid[1])
        side = size // splits[int(places.choice[0, y // size, x // size])]
        top, left = y // side * side, x // side * side
        patch = tokens[0, prefix:].unflatten(0, grid)[top : top + side, left : left + side]
        torch.testing.assert_close(read[0, index], patch.mean((0, 1)))


@pytest.mark.parametrize("grid", [(8, 12), (7, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_queries_are_those_of_every_split_at_their_places(grid: tuple[int, int], dtype: torch.dtype) -> None:
    layout = FixedLayout((2, 3, 1), grid, (4, 2, 1), 1)
    tokens = torch.randn(3, 1 + grid[0] * grid[1], 4, dtype=dtype)
    places = layout(torch.randn(3, 2, 3, 3))
    queries = layout.take(tokens, layout.pool(tokens), places)
    every = pool_every_split(tokens, grid, 1, (4, 2, 1))
    source = layout.source(places)
    assert queries.dtype == dtype
    for image in range(3):
        torch.testing.assert_close(queries[image], every[image, source[image]])
    assert torch.equal(take_rows(every, source), torch.stack([a[b] for a, b in zip(every, source, strict=True)]))


@pytest.mark.parametrize("counts", [(6, 0, 0), (0, 6, 0), (0, 0, 6), (2, 3, 1), (1, 0, 5), (0, 2, 4), (3, 3, 0)])
@pytest.mark.parametrize("levels", [1, 2, 3, 100])
def test_the_best_regions_get_the_finest_splits_and_the_first_of_equal_ones(
    counts: tuple[int, ...], levels: int
) -> None:
    logits = torch.randint(levels, (20, 2, 3, 3)).float()  # few levels: many regions are worth the same
    choice = FixedLayout(counts, (8, 12), (4, 2, 1), 1)(logits).choice
    for got, scores in zip(choice.flatten(1), logits.flatten(1, 2), strict=True):
        assert got.tolist() == plain_choice(scores, counts)


def test_ties_are_broken_where_many_regions_are_sorted() -> None:
    layout = FixedLayout((100, 50, 106), (64, 64), (4, 2, 1), 0)
    choice = layout(torch.zeros(2, 16, 16, 3)).choice.flatten(1)
    expected = torch.tensor([0] * 100 + [1] * 50 + [2] * 106)
    assert torch.equal(choice, expected.expand(2, -1))


@pytest.mark.parametrize("grid", [(8, 12), (7, 10)])
def test_room_is_made_for_the_most_queries_and_no_more_than_tokens(grid: tuple[int, int]) -> None:
    cost = count_queries(grid, (4, 2, 1), torch.device("cpu"))
    for counts in ((6, 0, 0), (0, 0, 6), (2, 3, 1), (0, 5, 1)):
        layout = FixedLayout(counts, grid, (4, 2, 1), 1)
        assert layout.num_queries == fixed_queries(counts, grid, (4, 2, 1), 1)
        needed = []
        for _ in range(20):
            choice = layout(torch.randn(1, 2, 3, 3)).choice
            needed.append(1 + int(cost.gather(-1, choice[0].unsqueeze(-1)).sum()))
        assert max(needed) <= layout.num_queries <= 1 + grid[0] * grid[1]
        if grid == (8, 12):
            assert set(needed) == {layout.num_queries}


def test_fine_splits_go_where_they_are_worth_most() -> None:
    logits = torch.zeros(2, 1, 4, 3)
    logits[0, 0, :, 0] = torch.tensor([1.0, 4.0, 3.0, 2.0])
    logits[1, 0, :, 0] = torch.tensor([9.0, 0.0, 5.0, 7.0])
    logits[:, 0, :, 1] = torch.tensor([0.5, 0.1, 0.2, 0.9])
    choice = FixedLayout((1, 2, 1), (4, 16), (4, 2, 1), 0)(logits).choice
    # After the best finest split, the best of the rest at the second; the first image's region 1, the second's 0.
    assert choice.squeeze(1).tolist() == [[1, 0, 2, 1], [0, 2, 1, 1]]


@pytest.mark.parametrize("counts", [(1, 2), (1, 2, 3), (5, -1, 0), (4, 0, 0, 0)])
def test_counts_that_do_not_fit_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"counts: got .*; expected 3 numbers of regions, .* add up to 4, .* 8 × 8"):
        FixedLayout(counts, (8, 8), (4, 2, 1), 1)
