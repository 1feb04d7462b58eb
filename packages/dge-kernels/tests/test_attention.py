from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, assert_close, wide
from torch import Tensor

import dge_kernels as dk
from dge_kernels import reference


def _inputs(
    plan: dk.QueryPlan, heads: int, width: int, keys: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    shapes = [(plan.total, heads, width), *[(plan.batch_size, keys, heads, width)] * 2]
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("heads", "width"), [(2, 64), (3, 20), (1, 1)])
def test_equals_the_reference(case: Case, heads: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
    plan = case.plan(device)
    inputs = _inputs(plan, heads, width, plan.num_tokens, device, dtype)
    exact = wide(*inputs)
    out, expected = dk.ragged_attention(*inputs, plan), reference.ragged_attention(*exact, plan)
    assert out.dtype == dtype
    assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(inputs, exact, strict=True):
        if ours.numel():  # without images the reference does not touch k and v
            assert_close(ours.grad, theirs.grad, slack=2)


@pytest.mark.parametrize("keys", [1, 5, 16, 257, 1000])
@pytest.mark.parametrize("width", [8, 32, 96, 256])
def test_keys_need_not_be_the_plans_tokens(keys: int, width: int, device: torch.device) -> None:
    plan = Case((6, 6)).plan(device)
    q, k, v = _inputs(plan, 2, width, keys, device, torch.float32)
    assert_close(dk.ragged_attention(q, k, v, plan, 0.3), reference.ragged_attention(*wide(q, k, v), plan, 0.3))


def test_equals_attention_per_image(device: torch.device) -> None:
    plan = Case((16, 16), batch=4).plan(device)
    q, k, v = (t.detach() for t in _inputs(plan, 3, 64, 257, device, torch.float32))
    for image, out in enumerate(dk.ragged_attention(q, k, v, plan).split(plan.lengths.tolist())):
        rows = slice(int(plan.cu_seqlens[image]), int(plan.cu_seqlens[image + 1]))
        dense = torch.nn.functional.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None].double(),
            k[image].transpose(0, 1)[None].double(),
            v[image].transpose(0, 1)[None].double(),
        )
        assert_close(out, dense[0].transpose(0, 1))


def test_an_image_does_not_depend_on_its_batch() -> None:
    plan = Case((16, 16), batch=5).plan()
    q, k, v = (t.detach() for t in _inputs(plan, 3, 64, 257, torch.device("cpu"), torch.float32))
    together = dk.ragged_attention(q, k, v, plan)
    for image in range(5):
        rows = slice(int(plan.cu_seqlens[image]), int(plan.cu_seqlens[image + 1]))
        count = rows.stop - rows.start
        ends = torch.tensor([0, count], dtype=torch.int32)
        alone = replace(plan, patches=plan.patches[rows], cu_seqlens=ends, max_seqlen=count)
        one = dk.ragged_attention(q[rows], k[image : image + 1], v[image : image + 1], alone)
        assert torch.equal(one, together[rows])


def test_strided_views_of_one_projection(device: torch.device, dtype: torch.dtype) -> None:
    plan = CASES["clipped"].plan(device)
    packed = torch.randn(3, plan.num_tokens, 2, 2, 32).to(device, dtype)
    q = torch.randn(2, plan.total, 32).to(device, dtype).transpose(0, 1)
    k, v = packed.unbind(2)
    contiguous = dk.ragged_attention(q.contiguous(), k.contiguous(), v.contiguous(), plan)
    assert torch.equal(dk.ragged_attention(q, k, v, plan), contiguous)
    every_other = torch.randn(plan.total, 2, 64).to(device, dtype)[..., ::2]
    expected = dk.ragged_attention(every_other.contiguous(), k, v, plan)
    assert torch.equal(dk.ragged_attention(every_other, k, v, plan), expected)


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    plan = CASES["whole"].plan(device)
    q, k, v = (t.detach() for t in _inputs(plan, 2, 16, 30, device, torch.float32))
    out = dk.ragged_attention(q * 1e4, k * 1e4, v, plan)
    assert bool(out.isfinite().all())
    # Scores this far apart leave one key: the one with the largest.
    best = torch.einsum("qhd,qnhd->qhn", q.double(), k.double()[plan.patches[:, 0].long()]).argmax(-1)
    chosen = v[plan.patches[:, 0].long()].gather(1, best[:, None, :, None].expand(-1, 1, -1, 16))[:, 0]
    assert_close(out, chosen)


def test_nan_stays_in_its_image(device: torch.device) -> None:
    plan = CASES["whole"].plan(device)
    q, k, v = (t.detach().clone() for t in _inputs(plan, 2, 16, 30, device, torch.float32))
    k[1] = float("nan")
    bad = dk.ragged_attention(q, k, v, plan).isnan().flatten(1).any(1)
    assert torch.equal(bad, plan.patches[:, 0] == 1)


def test_gradcheck(device: torch.device) -> None:
    plan = Case((4, 5), batch=2).plan(device)
    q, k, v = _inputs(plan, 2, 3, 6, device, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: dk.ragged_attention(*t, plan, 0.8), (q, k, v))


def test_repeated_gradients_are_bit_equal(device: torch.device) -> None:
    plan = Case((16, 16), batch=4).plan(device)
    inputs = _inputs(plan, 3, 64, 257, device, torch.float32)
    runs = [torch.autograd.grad(dk.ragged_attention(*inputs, plan).square().sum(), inputs) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_second_derivative_is_refused() -> None:
    plan = CASES["whole"].plan()
    q, k, v = _inputs(plan, 1, 8, 4, torch.device("cpu"), torch.float32)
    (grad,) = torch.autograd.grad(dk.ragged_attention(q, k, v, plan).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="ragged_attention cannot be differentiated twice"):
        torch.autograd.grad(grad.sum(), q)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_its_dtype(low: torch.dtype, device: torch.device) -> None:
    plan = CASES["whole"].plan(device)
    q, k, v = _inputs(plan, 2, 16, 30, device, torch.float32)
    with torch.autocast(device.type, dtype=low):
        out = dk.ragged_attention(q.to(low), k, v, plan)
    assert out.dtype == low
    assert torch.equal(out, dk.ragged_attention(q.to(low), k.to(low), v.to(low), plan))
    out.float().sum().backward()
    assert k.grad.dtype == torch.float32
    with torch.autocast(device.type, dtype=low):
        assert dk.ragged_attention(q.double(), k.double(), v.double(), plan).dtype == torch.float64
