import pytest
import torch
from cases import CASES, Case

import dge_kernels as dk
from dge_kernels import reference


def _assert_same(plan: dk.QueryPlan, expected: dk.QueryPlan) -> None:
    assert torch.equal(plan.patches, expected.patches)
    assert torch.equal(plan.cu_seqlens, expected.cu_seqlens)
    for name in ("grid", "num_prefix_tokens", "splits", "max_seqlen", "total"):
        assert getattr(plan, name) == getattr(expected, name), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("index", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_equals_the_reference(case: Case, index: torch.dtype, device: torch.device) -> None:
    choice = case.choice(device).to(index)
    arguments = {"grid": case.grid, "num_prefix_tokens": case.prefix}
    expected = reference.plan_queries(choice, case.splits, **arguments)
    _assert_same(dk.plan_queries(choice, case.splits, **arguments), expected)
    _assert_same(dk.plan_queries_async(choice, case.splits, **arguments).result(), expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_patches_cover_every_token_once(case: Case, device: torch.device) -> None:
    plan = case.plan(device)
    ones = torch.ones(plan.total, 1, device=device)
    blank = torch.zeros(case.batch, plan.num_tokens, 1, device=device)
    assert bool((dk.unpool_queries(ones, plan, blank) == 1).all())


def test_order_of_the_queries() -> None:
    plan = dk.plan_queries(torch.tensor([[[1, 0]]]), (2, 1), num_prefix_tokens=2)
    assert plan.patches.tolist() == [
        [0, -1, 0, 1],
        [0, -2, 0, 1],
        [0, 0, 0, 2],
        [0, 0, 2, 1],
        [0, 0, 3, 1],
        [0, 1, 2, 1],
        [0, 1, 3, 1],
    ]


def test_default_grid_is_whole_regions() -> None:
    assert dk.plan_queries(torch.zeros(1, 2, 3, dtype=torch.int64)).grid == (8, 12)


def test_max_seqlen_and_lengths() -> None:
    choice = torch.tensor([[[2, 2]], [[0, 1]]])
    plan = dk.plan_queries(choice, num_prefix_tokens=1)
    assert plan.lengths.tolist() == [3, 21]
    assert (plan.max_seqlen, plan.total, plan.batch_size, plan.num_tokens) == (21, 24, 2, 33)
    assert plan.max_seqlen == int(plan.max_seqlen)


def test_non_contiguous_choice() -> None:
    choice = torch.randint(0, 3, (2, 3, 5)).transpose(1, 2)
    _assert_same(dk.plan_queries(choice), reference.plan_queries(choice))


def test_to_moves_both_tensors(device: torch.device) -> None:
    plan = CASES["whole"].plan().to(device)
    assert plan.device == plan.cu_seqlens.device
    assert plan.device.type == device.type


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_two_halves_make_the_whole(case: Case, device: torch.device) -> None:
    choice, ops = case.choice(device), torch.ops.dge_kernels
    arguments = (list(case.splits), *case.grid, case.prefix)
    patches, cu_seqlens, _ = ops.plan_queries(choice, *arguments)
    sums, ends = ops.count_queries(choice, *arguments)
    assert torch.equal(ends, cu_seqlens)
    assert torch.equal(ops.write_patches(choice, sums, *arguments, len(patches)), patches)


def test_a_future_is_done_and_keeps_its_plan(device: torch.device) -> None:
    future = dk.plan_queries_async(torch.tensor([[[0, 2]]], device=device))
    plan = future.result()
    assert future.done()
    assert future.result() is plan


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_a_future_does_not_wait_for_what_is_queued_after_it() -> None:
    choice = torch.zeros(4, 4, 4, dtype=torch.uint8, device="cuda")
    dk.plan_queries_async(choice).result()
    torch.cuda.synchronize()
    future, later = dk.plan_queries_async(choice), torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    later.record()
    assert future.result().total == 4 * 256
    assert not later.query()
    torch.cuda.synchronize()
