"""Offsets beyond 2^31 elements. The memory is reserved but, where it is not touched, never filled."""

import pytest
import torch
from cases import Case, assert_close
from torch import Tensor

import dge_kernels as dk

FAR = 2**31 + 1024  # elements between two images, or two heads
CASE = Case((8, 8), batch=2, channels=64)


def _far_apart(near: Tensor) -> Tensor:
    """The same values, float16, with the first dimension's entries further apart than an int32 can count."""
    inner = [int(step) for step in near[0].contiguous().stride()]
    room = torch.empty(FAR + near[0].numel(), dtype=near.dtype, device=near.device)
    return room.as_strided(near.shape, (FAR, *inner)).copy_(near)


def test_images_far_apart(device: torch.device) -> None:
    plan, near = CASE.plan(device), CASE.tokens(device, torch.float16)
    x = _far_apart(near)
    assert x.stride(0) > 2**31
    pooled = dk.pool_queries(near, plan)
    assert torch.equal(dk.pool_queries(x, plan), pooled)
    assert torch.equal(dk.unpool_queries(pooled, plan, x), dk.unpool_queries(pooled, plan, near))
    weight = torch.randn(3, 64, device=device)
    arguments = {"grid": CASE.grid, "num_prefix_tokens": CASE.prefix}
    assert torch.equal(dk.route(x, weight, **arguments), dk.route(near, weight, **arguments))


def test_keys_and_values_far_apart(device: torch.device) -> None:
    plan, near = CASE.plan(device), CASE.tokens(device, torch.float16).unflatten(-1, (2, 32))
    q = torch.randn(plan.total, 2, 32, device=device).half()
    keys = _far_apart(near)
    ragged = (plan.cu_seqlens, plan.max_seqlen, 0.2)
    expected, logsumexp = torch.ops.dge_kernels.ragged_attention(q, near, near, *ragged)
    out, _ = torch.ops.dge_kernels.ragged_attention(q, keys, keys, *ragged)
    assert torch.equal(out, expected)
    grads = torch.ops.dge_kernels.ragged_attention_backward(q, q, keys, keys, out, logsumexp, *ragged)
    wanted = torch.ops.dge_kernels.ragged_attention_backward(q, q, near, near, out, logsumexp, *ragged)
    for grad, expected_grad in zip(grads, wanted, strict=True):
        assert torch.equal(grad, expected_grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_more_than_2_to_31_elements() -> None:
    """A dense batch and its queries, both larger than an int32 can count: only a GPU fills them quickly."""
    batch, channels = 8300, 1024
    choice = torch.full((batch, 4, 4), 1, dtype=torch.uint8, device="cuda")
    choice[-1] = 0
    plan = dk.plan_queries(choice, num_prefix_tokens=1)
    x = torch.zeros(batch, 257, channels, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[-1] = torch.randn(257, channels, device="cuda")
    pooled = dk.pool_queries(x, plan)
    assert torch.equal(pooled[-257:], x[-1])
    out = dk.unpool_queries(pooled, plan, x)
    assert_close(out[-1], 2 * x[-1].double())
    assert not bool(out[:-1].any())
