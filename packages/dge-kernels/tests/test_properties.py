"""Grids, splits, prefixes, dtypes, strides and choices drawn at random: the kernels against their definition."""

import torch
from cases import TOLERANCE, assert_close, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dge_kernels as dk
from dge_kernels import reference

SPLITS = [(1,), (2, 1), (1, 2), (4, 2, 1), (2, 4), (3, 1), (6, 3, 2, 1), (8, 4, 2, 1), (5,)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[dk.QueryPlan, dk.QueryPlan, Tensor, torch.dtype]:
    splits = draw(st.sampled_from(SPLITS))
    grid = (draw(st.integers(1, 18)), draw(st.integers(1, 18)))
    prefix, batch, channels = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 70))
    size = max(splits)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    regions = (-(-grid[0] // size), -(-grid[1] // size))
    choice = torch.randint(0, len(splits), (batch, *regions), generator=generator)
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    x = torch.randn(batch, prefix + grid[0] * grid[1], channels, generator=generator).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "channels first", "padded"]))
    if layout == "channels first":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "padded":
        x = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    arguments = {"grid": grid, "num_prefix_tokens": prefix}
    plan = dk.plan_queries(choice, splits, **arguments)
    return plan, reference.plan_queries(choice, splits, **arguments), x, dtype


@settings(max_examples=60, deadline=None)
@given(problems())
def test_plan(problem: tuple[dk.QueryPlan, dk.QueryPlan, Tensor, torch.dtype]) -> None:
    plan, expected, _, _ = problem
    assert torch.equal(plan.patches, expected.patches)
    assert torch.equal(plan.cu_seqlens, expected.cu_seqlens)
    assert plan.max_seqlen == expected.max_seqlen


@settings(max_examples=60, deadline=None)
@given(problems())
def test_pool_and_unpool(problem: tuple[dk.QueryPlan, dk.QueryPlan, Tensor, torch.dtype]) -> None:
    plan, _, x, _ = problem
    x.requires_grad_()
    (exact,) = wide(x)
    pooled, expected = dk.pool_queries(x, plan), reference.pool_queries(exact, plan)
    assert_close(pooled, expected)
    back = dk.unpool_queries(pooled, plan, x)
    exact_back = reference.unpool_queries(pooled.detach().double(), plan, exact)
    assert_close(back, exact_back)
    (grad,) = torch.autograd.grad(back.double().sum() + pooled.double().square().sum(), x)
    again = reference.pool_queries(exact, plan)
    result = reference.unpool_queries(again, plan, exact).sum() + again.square().sum()
    assert_close(grad, torch.autograd.grad(result, exact)[0], slack=3)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 3), st.integers(1, 40), st.integers(1, 70))
def test_attention(
    problem: tuple[dk.QueryPlan, dk.QueryPlan, Tensor, torch.dtype], heads: int, width: int, keys: int
) -> None:
    plan, _, _, dtype = problem
    shapes = [(plan.total, heads, width), *[(plan.batch_size, keys, heads, width)] * 2]
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(keys)).to(dtype) for shape in shapes]
    for tensor in inputs:
        tensor.requires_grad_()
    exact = wide(*inputs)
    out, expected = dk.ragged_attention(*inputs, plan), reference.ragged_attention(*exact, plan)
    assert_close(out, expected)
    grad = torch.linspace(-1, 1, max(1, out.numel()))[: out.numel()].view_as(out)
    out.backward(grad.to(dtype))
    expected.backward(grad.to(dtype).double())
    for ours, theirs in zip(inputs, exact, strict=True):
        if ours.numel():  # without images the reference does not touch k and v
            assert_close(ours.grad, theirs.grad, slack=3)
