"""What an operator allocates: its outputs and O(Q) integers, however large its inputs are."""

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from cases import Case
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import dge_kernels as dk

CASE = Case((16, 16), batch=8, channels=96)


def _peak_bytes(call: Callable[[], object]) -> tuple[int, object]:
    """The most memory that was allocated at once while `call` ran, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        result = call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert changes, "the profiler recorded no allocation"
    return max(accumulate(changes)), result


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _calls(plan: dk.QueryPlan) -> dict[str, Callable[[], object]]:
    x, rows = CASE.tokens(), torch.randn(plan.total, CASE.channels)
    q, keys = rows.unflatten(-1, (3, 32)), x.unflatten(-1, (3, 32))
    choice, weight = CASE.choice(), torch.randn(3, CASE.channels)
    ops, geometry = torch.ops.dge_kernels, (*plan.grid, plan.num_prefix_tokens)
    ragged = (plan.cu_seqlens, plan.max_seqlen, 0.2)
    out, logsumexp = ops.ragged_attention(q, keys, keys, *ragged)
    packed, bias = keys.flatten(0, 1), torch.zeros(keys.shape[0] * keys.shape[1], 3)
    ends = torch.arange(0, len(packed) + 1, keys.shape[1], dtype=torch.int32)
    attention = (*ragged, ends, bias)
    return {
        "packed attention": lambda: ops.ragged_attention(q, packed, packed, *attention),
        "packed attention backward": lambda: ops.ragged_attention_backward(
            out, q, packed, packed, out, logsumexp, *attention
        ),
        "plan": lambda: ops.plan_queries(choice, [4, 2, 1], *geometry)[:2],
        "pool": lambda: ops.pool_queries(x, plan.patches, *geometry),
        "pool backward": lambda: ops.pool_queries_backward(rows, plan.patches, CASE.batch, *geometry),
        "unpool": lambda: ops.unpool_queries(rows, plan.patches, x, *geometry),
        "unpool backward": lambda: ops.unpool_queries_backward(x, plan.patches, *geometry),
        "attention": lambda: ops.ragged_attention(q, keys, keys, *ragged),
        "attention backward": lambda: ops.ragged_attention_backward(out, q, keys, keys, out, logsumexp, *ragged),
        "route": lambda: dk.route(x, weight, grid=CASE.grid, num_prefix_tokens=1),
    }


@pytest.mark.parametrize("name", _calls(CASE.plan()))
def test_allocates_its_outputs_and_little_more(name: str) -> None:
    plan = CASE.plan()
    call = _calls(plan)[name]
    call()
    peak, result = _peak_bytes(call)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    assert peak <= _bytes(*outputs) + 8 * plan.total + 1024
