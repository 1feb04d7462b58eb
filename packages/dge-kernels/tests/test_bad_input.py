"""Every rejected input, with words from its message."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import dge_kernels as dk

PLAN = dk.plan_queries(torch.tensor([[[0, 1]]]), num_prefix_tokens=1)
X = torch.randn(1, 33, 8)
ROWS = torch.randn(PLAN.total, 8)
Q, K = torch.randn(PLAN.total, 2, 4), torch.randn(1, 5, 2, 4)
CHOICE, WEIGHT = torch.zeros(1, 1, 1, dtype=torch.int64), torch.randn(3, 8)
ENDS = {"cu_seqlens_q": torch.tensor([0, 4, PLAN.total]).int(), "cu_seqlens_k": torch.tensor([0, 3, 5]).int()}
META = torch.empty(1, 33, 8, device="meta")


def _plan(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: dk.plan_queries(*args, **kwargs)


def _route(x: torch.Tensor = X, weight: Any = WEIGHT, bias: Any = None, **kwargs: Any) -> Callable[[], Any]:
    arguments = {"grid": (4, 8), "num_prefix_tokens": 1, **kwargs}
    return lambda: dk.route(x, weight, bias, **arguments)


def _packed(q: Any = Q, k: Any = K[0], v: Any = K[0], plan: Any = None, **kwargs: Any) -> Callable[[], Any]:
    return lambda: dk.ragged_attention(q, k, v, plan, **{**ENDS, **kwargs})


def _ends(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


REJECTED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (_plan([[0]]), TypeError, "choice must be a torch.Tensor, got list"),
    (_plan(CHOICE.float()), TypeError, "choice must be uint8, int8, int16, int32 or int64, got torch.float32"),
    (_plan(CHOICE.bool()), TypeError, "choice must be uint8, int8, int16, int32 or int64, got torch.bool"),
    (_plan(CHOICE[0]), ValueError, "choice must be [B, rows of regions, columns of regions], got shape [1, 1]"),
    (_plan(CHOICE, grid=(4, 5)), ValueError, "choice must have one entry per region, [B, 1, 2] for grid (4, 5)"),
    (_plan(CHOICE[:, :0]), ValueError, "choice must have one entry per region"),
    (_plan(CHOICE + 3), ValueError, "choice must be in [0, 3), got 3 for image 0, region 0"),
    (_plan(CHOICE - 1), ValueError, "choice must be in [0, 3), got -1 for image 0, region 0"),
    (_plan(CHOICE, (4, 3)), ValueError, "splits must each divide the largest, which is the region's side, got (4, 3)"),
    (_plan(CHOICE, ()), ValueError, "splits must be a tuple of integers of at least 1, such as (4, 2, 1), got ()"),
    (_plan(CHOICE, (4, 0)), ValueError, "splits must be a tuple of integers of at least 1"),
    (_plan(CHOICE, (4, 2.0)), ValueError, "splits must be a tuple of integers of at least 1"),
    (_plan(CHOICE, 4), ValueError, "splits must be a tuple of integers of at least 1, such as (4, 2, 1), got 4"),
    (_plan(CHOICE, (2, 2)), ValueError, "splits must be at most 256 different integers, got (2, 2)"),
    (_plan(CHOICE, grid=(0, 4)), ValueError, "got shape [1, 1, 1]"),
    (_plan(CHOICE, num_prefix_tokens=-1), ValueError, "num_prefix_tokens must be an integer of at least 0, got -1"),
    (_plan(CHOICE, num_prefix_tokens=1.5), ValueError, "num_prefix_tokens must be an integer of at least 0, got 1.5"),
    (lambda: dk.pool_queries(X[0], PLAN), ValueError, "x must be [B, N, C], got shape [33, 8]"),
    (lambda: dk.pool_queries(X[:, :32], PLAN), ValueError, "x must be [1, 33, C] for this plan"),
    (lambda: dk.pool_queries(X.expand(2, -1, -1), PLAN), ValueError, "x must be [1, 33, C] for this plan"),
    (lambda: dk.pool_queries(X.int(), PLAN), TypeError, "x must be float32, float64, float16 or bfloat16, got"),
    (lambda: dk.pool_queries(X, PLAN.patches), TypeError, "plan must be a QueryPlan (from plan_queries), got Tensor"),
    (lambda: dk.pool_queries(META, PLAN), ValueError, "plan must be on the device of x, meta, got cpu"),
    (lambda: dk.unpool_queries(ROWS[1:], PLAN, X), ValueError, f"delta must have the plan's {PLAN.total} queries"),
    (lambda: dk.unpool_queries(ROWS[:, 1:], PLAN, X), ValueError, "residual must be [1, 33, 7] for this plan"),
    (lambda: dk.unpool_queries(ROWS.half(), PLAN, X), TypeError, "delta must have the dtype of residual"),
    (lambda: dk.unpool_queries(ROWS, PLAN, None), TypeError, "residual must be a torch.Tensor, got NoneType"),
    (lambda: dk.ragged_attention(Q[1:], K, K, PLAN), ValueError, f"q must have the plan's {PLAN.total} queries"),
    (lambda: dk.ragged_attention(Q, K[:, :, :1], K, PLAN), ValueError, "k must be [1, N, 2, 4]"),
    (lambda: dk.ragged_attention(Q, K, K[:, :4], PLAN), ValueError, "v must be [1, N, 2, 4] with one N >= 1"),
    (lambda: dk.ragged_attention(Q, K[:, :0], K[:, :0], PLAN), ValueError, "k must be [1, N, 2, 4] with one N >= 1"),
    (lambda: dk.ragged_attention(Q, K.half(), K, PLAN), TypeError, "k must have the dtype of q, torch.float32, got"),
    (lambda: dk.ragged_attention(Q[0], K, K, PLAN), ValueError, "q must be [Q, heads, head_dim], got shape"),
    (
        lambda: dk.ragged_attention(Q, K, K),
        ValueError,
        "plan or cu_seqlens_q must say which queries are an image's, got",
    ),
    (_packed(plan=PLAN), ValueError, "plan and cu_seqlens_q both say which queries are an image's, expected one of"),
    (_packed(cu_seqlens_q=[0, 21]), TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
    (_packed(cu_seqlens_q=torch.tensor([0, 4, 21])), TypeError, "cu_seqlens_q must be int32, got torch.int64"),
    (_packed(cu_seqlens_q=_ends()), ValueError, "cu_seqlens_q must be [B + 1], got shape [0]"),
    (_packed(cu_seqlens_k=_ends(0, 5)), ValueError, "cu_seqlens_k must be [2 + 1], got shape [2]"),
    (_packed(cu_seqlens_k=META[0, 0, :3].int()), ValueError, "cu_seqlens_k must be on the device of q, cpu, got meta"),
    (_packed(cu_seqlens_k=_ends(0, 3, 4)), ValueError, "cu_seqlens_k must rise from 0 to the 5 keys of k"),
    (_packed(cu_seqlens_k=_ends(0, 6, 5)), ValueError, "cu_seqlens_k must rise from 0 to the 5 keys of k"),
    (_packed(cu_seqlens_k=_ends(1, 3, 5)), ValueError, "cu_seqlens_k must rise from 0 to the 5 keys of k"),
    (_packed(cu_seqlens_q=_ends(0, 4, 20)), ValueError, "cu_seqlens_q must rise from 0 to the 21 queries of q"),
    (_packed(k=K, v=K), ValueError, "k must be [K, heads, head_dim], got shape [1, 5, 2, 4]"),
    (_packed(v=K[0, :4]), ValueError, "v must be [K, 2, 4] with one K for k and v, got shape [4, 2, 4]"),
    (_packed(k=K[0, :, :1]), ValueError, "k must be [K, 2, 4] with one K for k and v, got shape [5, 1, 4]"),
    (
        _packed(bias=torch.zeros(4)),
        ValueError,
        "bias must be [5], one number per key, or [5, 2], one per key and head,",
    ),
    (
        _packed(bias=torch.zeros(5).long()),
        TypeError,
        "bias must be float32, float64, float16 or bfloat16, got torch.int",
    ),
    (_packed(bias=META[0, 0, :5]), ValueError, "bias must be on the device of q, cpu, got meta"),
    (_packed(bias=0.5), TypeError, "bias must be a torch.Tensor, got float"),
    (_packed(max_seqlen_q=-1), ValueError, "max_seqlen_q must be an integer of at least 0, got -1"),
    (_packed(max_seqlen_k=2.5), ValueError, "max_seqlen_k must be an integer of at least 0, got 2.5"),
    (_packed(cu_seqlens_k=None, max_seqlen_k=5), ValueError, "max_seqlen_k must be None without cu_seqlens_k, got 5"),
    (
        lambda: dk.ragged_attention(Q, K, K, PLAN, max_seqlen_q=5),
        ValueError,
        "max_seqlen_q must be None without cu_seq",
    ),
    (_route(X[0]), ValueError, "x must be [B, N, C], got shape [33, 8]"),
    (_route(grid=(4, 4)), ValueError, "x must be [B, 17, C] for 1 prefix tokens and grid (4, 4), got shape"),
    (_route(grid=(4, 0)), ValueError, "grid must be (height, width) in tokens, both at least 1, got (4, 0)"),
    (_route(grid=32), ValueError, "grid must be (height, width) in tokens, both at least 1, got 32"),
    (_route(splits=(4, 2)), ValueError, "weight must be [2, 8] (splits, C), got shape [3, 8]"),
    (_route(weight=WEIGHT[:, 1:]), ValueError, "weight must be [3, 8] (splits, C), got shape [3, 7]"),
    (_route(bias=torch.zeros(2)), ValueError, "bias must be [3], one entry per split, got shape [2]"),
    (_route(weight=WEIGHT.long()), TypeError, "weight must be float32, float64, float16 or bfloat16, got"),
]


@pytest.mark.parametrize(("call", "kind", "words"), REJECTED, ids=[words for _, _, words in REJECTED])
def test_is_refused_with_these_words(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        call()


@pytest.mark.parametrize("call", [dk.plan_queries, dk.plan_queries_async])
@pytest.mark.parametrize("value", [-1, 3])
def test_a_choice_out_of_range_is_refused(call: Callable[..., Any], value: int) -> None:
    choice = torch.tensor([[[0, 1]], [[2, value]]])
    with pytest.raises(ValueError, match=re.escape(f"choice must be in [0, 3), got {value} for image 1, region 1")):
        call(choice)


def test_sums_of_another_choice_are_refused() -> None:
    arguments = ([4, 2, 1], 4, 8, 1)
    choice, ops = torch.tensor([[[0, 1]]]), torch.ops.dge_kernels
    sums, _ = ops.count_queries(choice, *arguments)
    for wrong, total in ((sums + 1, 22), (sums, 20)):
        with pytest.raises(RuntimeError, match="sums and total must be those that count_queries found"):
            ops.write_patches(choice, wrong, *arguments, total)
    with pytest.raises(RuntimeError, match="total must be from 0 to the batch's 33 tokens, got 34"):
        ops.write_patches(choice, sums, *arguments, 34)


@pytest.mark.parametrize("column", [0, 1, 2, 3])
def test_a_plan_made_by_hand_cannot_reach_outside(column: int) -> None:
    patches = PLAN.patches.clone()
    patches[3, column] = 1000 if column != 3 else 0
    plan = replace(PLAN, patches=patches)
    for call in (lambda: dk.pool_queries(X, plan), lambda: dk.unpool_queries(ROWS, plan, X)):
        with pytest.raises(RuntimeError, match="patches row 3 lies outside the batch"):
            call()


def test_a_plan_that_leaves_tokens_out_is_refused() -> None:
    patches = PLAN.patches.clone()
    patches[-1] = patches[0]
    with pytest.raises(RuntimeError, match="patches must cover each of the 33 tokens once, they cover 30"):
        dk.unpool_queries(ROWS, replace(PLAN, patches=patches), X)


@pytest.mark.parametrize("ends", [[0, 3], [1, 21], [0, 9, 21]])
def test_ends_that_do_not_fit_are_refused(ends: list[int]) -> None:
    plan = replace(PLAN, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    keys = K.expand(len(ends) - 1, -1, -1, -1)
    if ends == [0, 9, 21]:
        plan = replace(plan, cu_seqlens=torch.tensor([0, 22, 21], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the 21 queries of q"):
        dk.ragged_attention(Q, keys, keys, plan)


def test_checked_mode_finds_a_bad_choice_on_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        pytest.skip("the CPU always checks")
    monkeypatch.setattr("dge_kernels.functional._CHECK_DEVICE_VALUES", True)
    with pytest.raises(ValueError, match=re.escape("choice must be in [0, 3), got values from 0 to 7")):
        dk.plan_queries(torch.tensor([[[0, 7]]], device=device))
