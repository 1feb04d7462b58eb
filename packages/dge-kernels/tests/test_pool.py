import pytest
import torch
from cases import CASES, Case, assert_close, wide

import dge_kernels as dk
from dge_kernels import reference


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pool_and_its_gradient(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    plan, x = case.plan(device), case.tokens(device, dtype).requires_grad_()
    (exact,) = wide(x)
    pooled, expected = dk.pool_queries(x, plan), reference.pool_queries(exact, plan)
    assert pooled.dtype == dtype
    assert_close(pooled, expected)
    grad = torch.randn_like(pooled)
    pooled.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, exact.grad)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_unpool_and_its_gradients(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    plan, residual = case.plan(device), case.tokens(device, dtype).requires_grad_()
    delta = torch.randn(plan.total, case.channels).to(device, dtype).requires_grad_()
    exact_delta, exact_residual = wide(delta, residual)
    result = dk.unpool_queries(delta, plan, residual)
    expected = reference.unpool_queries(exact_delta, plan, exact_residual)
    assert result.dtype == dtype
    assert_close(result, expected)
    grad = torch.randn_like(result)
    result.backward(grad)
    expected.backward(grad.double())
    assert_close(delta.grad, exact_delta.grad)
    assert_close(residual.grad, exact_residual.grad)


def test_prefix_tokens_are_copied_bit_for_bit(device: torch.device, dtype: torch.dtype) -> None:
    case = Case((5, 6), prefix=3)
    plan, x = case.plan(device), case.tokens(device, dtype)
    first = plan.cu_seqlens[:-1].long()
    assert torch.equal(dk.pool_queries(x, plan)[first + 2], x[:, 2])


def test_half_precision_sums_in_float32() -> None:
    # 16 tokens whose sum, 16 * 2049, is not a half number, while each token and the mean are.
    x = torch.full((1, 16, 1), 2050.0, dtype=torch.float16)
    plan = dk.plan_queries(torch.tensor([[[2]]]))
    assert dk.pool_queries(x, plan).item() == 2050.0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 2.0**-24, 65504.0, -0.0])
def test_special_values_survive(value: float, dtype: torch.dtype) -> None:
    x = torch.full((1, 16, 7), value, dtype=dtype)
    plan = dk.plan_queries(torch.tensor([[[2]]]))
    expected = x[:, 0]
    assert torch.equal(dk.pool_queries(x, plan).nan_to_num(123.0), expected.nan_to_num(123.0))


def test_strided_inputs(device: torch.device, dtype: torch.dtype) -> None:
    case = CASES["clipped"]
    plan, x = case.plan(device), case.tokens(device, dtype)
    padded = torch.cat([x, x], dim=2)[:, :, : case.channels]
    channels_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    for view in (padded, channels_first, x.flip(0).flip(0)):
        assert torch.equal(dk.pool_queries(view, plan), dk.pool_queries(x, plan))
        delta = torch.ones(plan.total, 2 * case.channels, device=device, dtype=dtype)[:, ::2]
        assert torch.equal(dk.unpool_queries(delta, plan, view), x + 1)


def test_expanded_batch(device: torch.device) -> None:
    case = CASES["whole"]
    x = case.tokens(device)[:1].expand(case.batch, -1, -1)
    plan = case.plan(device)
    assert torch.equal(dk.pool_queries(x, plan), dk.pool_queries(x.contiguous(), plan))


def test_repeated_calls_are_bit_equal(device: torch.device) -> None:
    case = Case((16, 16), batch=8, channels=192)
    plan, x = case.plan(device), case.tokens(device).requires_grad_()
    runs = [dk.pool_queries(x, plan) for _ in range(3)]
    grads = [torch.autograd.grad(run.square().sum(), x)[0] for run in runs]
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_gradcheck(device: torch.device) -> None:
    case = Case((5, 6), channels=2, batch=2)
    plan = case.plan(device)
    x = case.tokens(device, torch.float64).requires_grad_()
    delta = torch.randn(plan.total, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: dk.pool_queries(t, plan), (x,))
    assert torch.autograd.gradcheck(lambda d, r: dk.unpool_queries(d, plan, r), (delta, x))


def test_second_derivative_is_refused() -> None:
    case = CASES["whole"]
    plan, x = case.plan(), case.tokens().requires_grad_()
    (grad,) = torch.autograd.grad(dk.pool_queries(x, plan).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="pool_queries cannot be differentiated twice"):
        torch.autograd.grad(grad.sum(), x)


def test_autocast_keeps_the_residuals_dtype() -> None:
    case = CASES["whole"]
    plan, x = case.plan(), case.tokens()
    delta = torch.randn(plan.total, case.channels).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = dk.unpool_queries(delta, plan, x)
        assert dk.pool_queries(x, plan).dtype == torch.float32
    assert result.dtype == torch.float32
    assert torch.equal(result, dk.unpool_queries(delta.float(), plan, x))
