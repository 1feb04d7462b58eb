"""Groups of tokens: who merges with whom, means, and the way back, held to a slow definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dge_models.merging import Groups, match, merge, restore, select_above, select_most, single_tokens


def _packed(lengths: list[int], sizes: list[list[int]] | None = None) -> Groups:
    """Images with these numbers of groups, one prefix token each."""
    image = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    flat = torch.ones(sum(lengths)) if sizes is None else torch.tensor([size for own in sizes for size in own]).float()
    return Groups(
        image, flat, torch.tensor(lengths), max(lengths), len(lengths), 1, even=False, merged=sizes is not None
    )


def _slow_partner(keys: Tensor) -> list[tuple[float, int | None]]:
    """Similarity and partner of each group of one image, prefix token first."""
    means = F.normalize(keys.mean(1), dim=-1)
    found: list[tuple[float, int | None]] = [(-torch.inf, None)] * len(keys)
    for one in range(1, len(keys), 2):
        others = [(float(means[one] @ means[other]), other) for other in range(2, len(keys), 2)]
        if others:
            found[one] = max(others)
    return found


@pytest.mark.parametrize("lengths", [[9, 9], [9, 4, 1, 2, 6], [3], [2, 3], [8, 17, 5]])
def test_every_second_group_finds_the_most_similar_of_its_image(lengths: list[int]) -> None:
    keys = torch.randn(sum(lengths), 2, 8, generator=torch.Generator().manual_seed(0))
    found = match(keys, _packed(lengths))
    assert found is not None
    start = 0
    for length in lengths:
        for index, (similarity, partner) in enumerate(_slow_partner(keys[start : start + length])):
            torch.testing.assert_close(float(found.similarity[start + index]), similarity)
            if partner is not None:
                assert found.partner[start + index] == start + partner
        start += length


def test_even_groups_match_as_packed_ones_do() -> None:
    x = torch.randn(3, 8, 5)
    even, ragged = (single_tokens(x, 1, even=flag) for flag in (True, False))
    keys = torch.randn(24, 2, 4)
    one, other = match(keys, even), match(keys, ragged)
    assert one is not None and other is not None
    torch.testing.assert_close(one.similarity, other.similarity)
    asked = one.similarity > -torch.inf
    assert torch.equal(one.partner[asked], other.partner[asked])


def test_without_two_groups_there_is_no_match() -> None:
    assert match(torch.randn(4, 1, 4), _packed([2, 2])) is None


def test_at_most_the_limit_may_merge() -> None:
    keys = torch.randn(30, 2, 8)
    groups = _packed([19, 11])
    free, limited = match(keys, groups), match(keys, groups, 3)
    assert free is not None and limited is not None
    for own in (slice(0, 19), slice(19, 30)):
        best = free.similarity[own].topk(3).values
        allowed = limited.similarity[own] > -torch.inf
        assert torch.equal(limited.similarity[own][allowed].sort(descending=True).values, best)


def test_groups_merge_into_means_weighted_by_size() -> None:
    sizes = [[1, 3, 1, 2, 5], [1, 1, 1]]
    groups = _packed([5, 3], sizes)
    x, keys = torch.randn(8, 4, dtype=torch.float32), torch.randn(8, 1, 4)
    found = match(keys, groups)
    assert found is not None
    selected = select_above(found, -2.0)
    assert selected.tolist() == [False, True, False, True, False, False, True, False]
    step, left = merge(x, groups, found, selected)
    assert left.lengths.tolist() == [3, 2]
    assert left.longest == 3
    assert left.cu_seqlens.tolist() == [0, 3, 5]
    assert left.image.tolist() == [0, 0, 0, 1, 1]
    assert float(left.sizes.sum()) == float(groups.sizes.sum())
    for new in range(5):
        members = (step.group == new).nonzero().flatten()
        weights = groups.sizes[members].unsqueeze(1)
        torch.testing.assert_close(step.after[new], (x[members] * weights).sum(0) / weights.sum())
    # The order of the grid is kept, and prefix tokens stay what they are.
    assert torch.equal(step.after[[0, 3]], x[[0, 5]])
    assert step.group[~selected].tolist() == list(range(5))


def test_what_takes_in_nothing_is_unchanged_to_the_bit() -> None:
    groups = _packed([9])
    x, keys = torch.randn(9, 4), torch.randn(9, 1, 4)
    found = match(keys, groups)
    assert found is not None
    selected = select_above(found, float(found.similarity.max()) - 1e-6)
    step, _ = merge(x, groups, found, selected)
    alone = [new for new in range(len(step.after)) if int((step.group == new).sum()) == 1]
    assert len(alone) == 7
    assert all(torch.equal(step.after[new], x[(step.group == new).nonzero().item()]) for new in alone)


def test_the_most_similar_of_every_image_merge() -> None:
    x = torch.randn(2, 9, 4)
    groups = single_tokens(x, 1, even=True)
    found = match(torch.randn(18, 2, 4), groups)
    assert found is not None
    selected = select_most(found, groups, 3).view(2, 9)
    assert selected.sum(1).tolist() == [3, 3]
    similarity = found.similarity.view(2, 9)
    for index in range(2):
        assert similarity[index][selected[index]].min() >= similarity[index][1::2][~selected[index][1::2]].max()
    step, left = merge(x.flatten(0, 1), groups, found, selected.flatten(), 3)
    assert (left.longest, left.even, step.after.shape) == (6, True, (12, 4))


def test_the_way_back_adds_a_groups_change_to_each_of_its_tokens() -> None:
    groups = _packed([7, 5])
    x = torch.randn(12, 3)
    steps, now = [], x
    for seed in range(2):
        found = match(torch.randn(len(now), 1, 4, generator=torch.Generator().manual_seed(seed)), groups)
        assert found is not None
        step, groups = merge(now, groups, found, select_above(found, 0.0))
        steps.append(step)
        now = step.after
    torch.testing.assert_close(restore(now, steps), x)
    change = torch.randn_like(now)
    both = steps[1].group[steps[0].group]
    torch.testing.assert_close(restore(now + change, steps), x + change[both])


def test_gradients_reach_every_token() -> None:
    groups = _packed([7, 5])
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    found = match(torch.randn(12, 1, 4), groups)
    assert found is not None
    step, _ = merge(x, groups, found, select_above(found, 0.0))
    restore(step.after.tanh(), [step]).square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()
