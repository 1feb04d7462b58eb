"""torch.func: vmap is supported where it makes sense and refused where not; its derivatives are refused."""

import re
from collections.abc import Callable

import pytest
import torch
from cases import Case
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

import dge_kernels as dk

CASE = Case((5, 7), channels=12)
vmap = torch.func.vmap


def _each(call: Callable[..., Tensor], *mapped: Tensor) -> Tensor:
    return torch.stack([call(*element) for element in zip(*mapped, strict=True)])


def _data(device: torch.device) -> tuple[dk.QueryPlan, Tensor, Tensor]:
    """A plan, and three elements of tokens and of rows for it."""
    plan = CASE.plan(device)
    return plan, torch.randn(3, CASE.batch, 36, 12, device=device), torch.randn(3, plan.total, 12, device=device)


@pytest.mark.parametrize("dim", [0, 2])
def test_vmap_of_pooling_and_unpooling(dim: int, device: torch.device) -> None:
    plan, x, rows = _data(device)
    pool = lambda tokens: dk.pool_queries(tokens, plan)  # noqa: E731
    assert torch.equal(vmap(pool, in_dims=dim)(x.movedim(0, dim)), _each(pool, x))
    unpool = lambda delta, tokens: dk.unpool_queries(delta, plan, tokens)  # noqa: E731
    assert torch.equal(vmap(unpool)(rows, x), _each(unpool, rows, x))
    shared = vmap(unpool, in_dims=(0, None))(rows, x[0])
    assert torch.equal(shared, _each(lambda delta: unpool(delta, x[0]), rows))


def test_vmap_of_attention(device: torch.device) -> None:
    plan, x, rows = _data(device)
    attend = lambda q, k, v: dk.ragged_attention(q, k, v, plan)  # noqa: E731
    q, keys = rows.unflatten(-1, (3, 4)), x.unflatten(-1, (3, 4))
    torch.testing.assert_close(vmap(attend)(q, keys, 2 * keys), _each(attend, q, keys, 2 * keys))
    shared = vmap(attend, in_dims=(0, None, None))(q, keys[0], keys[1])
    torch.testing.assert_close(shared, _each(lambda query: attend(query, keys[0], keys[1]), q))


def _packed(device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    lengths = torch.tensor([0, 4, 1, 6], device=device).cumsum(0).int()
    arguments = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths}
    return torch.randn(3, 11, 3, 4, device=device), torch.randn(3, 11, 3, device=device), arguments


@pytest.mark.parametrize("per_head", [False, True])
def test_vmap_of_packed_keys_and_a_bias(per_head: bool, device: torch.device) -> None:
    x, bias, arguments = _packed(device)
    bias = bias if per_head else bias[..., 0]
    attend = lambda t, b: dk.ragged_attention(t, 2 * t, t, bias=b, **arguments)  # noqa: E731
    torch.testing.assert_close(vmap(attend)(x, bias), _each(attend, x, bias))
    shared = vmap(attend, in_dims=(0, None))(x, bias[0])
    torch.testing.assert_close(shared, _each(lambda t: attend(t, bias[0]), x))
    only = vmap(attend, in_dims=(None, 0))(x[0], bias)
    torch.testing.assert_close(only, _each(lambda b: attend(x[0], b), bias))
    dense = lambda t, b: dk.ragged_attention(t, t.view(1, 11, 3, 4), t.view(1, 11, 3, 4), bias=b[None], **one)  # noqa: E731
    one = {"cu_seqlens_q": torch.tensor([0, 11], device=device, dtype=torch.int32)}
    torch.testing.assert_close(vmap(dense)(x, bias), _each(dense, x, bias))


@pytest.mark.parametrize("biased", [False, True])
def test_several_gradients_of_packed_keys_at_once(biased: bool, device: torch.device) -> None:
    x, bias, arguments = _packed(device)
    leaves = [x[0].requires_grad_(), *([bias[0].requires_grad_()] if biased else [])]
    out = dk.ragged_attention(*[leaves[0]] * 3, bias=leaves[1] if biased else None, **arguments)
    grads = torch.randn(3, *out.shape, device=device)
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for index, together in enumerate(batched):
        single = [torch.autograd.grad(out, leaves, grad, retain_graph=True)[index] for grad in grads]
        torch.testing.assert_close(together, torch.stack(single))


def test_vmap_over_the_division_into_images_is_refused() -> None:
    x, _, arguments = _packed(torch.device("cpu"))
    ends = arguments["cu_seqlens_q"].expand(2, -1)
    with pytest.raises(RuntimeError, match=re.escape("cu_seqlens cannot be mapped by torch.func.vmap: each")):
        vmap(lambda e: dk.ragged_attention(x[0], x[0], x[0], cu_seqlens_q=e, cu_seqlens_k=e))(ends)


@pytest.mark.parametrize("mapped", ["x", "weight", "both"])
def test_vmap_of_route(mapped: str, device: torch.device) -> None:
    _, x, _ = _data(device)
    weight = torch.randn(3, 3, 12, device=device)
    route = lambda tokens, w: dk.route(tokens, w, grid=CASE.grid, num_prefix_tokens=1)  # noqa: E731
    dims = (None if mapped == "weight" else 0, None if mapped == "x" else 0)
    arguments = [t if dim == 0 else t[0] for t, dim in zip((x, weight), dims, strict=True)]
    expanded = [t if dim == 0 else t[:1].expand_as(t) for t, dim in zip((x, weight), dims, strict=True)]
    assert torch.equal(vmap(route, in_dims=dims)(*arguments), _each(route, *expanded))


def test_several_gradients_at_once(device: torch.device) -> None:
    """`is_grads_batched` maps the backward operators, as torch.autograd.functional.jacobian can ask for."""
    plan, x, _ = _data(device)
    tokens = x[0].requires_grad_()
    q = dk.pool_queries(tokens, plan).unflatten(-1, (3, 4))
    keys = tokens.unflatten(-1, (3, 4))
    out = dk.unpool_queries(dk.ragged_attention(q, keys, keys, plan).flatten(1), plan, tokens)
    grads = torch.randn(3, *out.shape, device=device)
    (batched,) = torch.autograd.grad(out, tokens, grads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, tokens, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(batched, torch.stack(single))


@pytest.mark.parametrize("call", [dk.plan_queries, dk.plan_queries_async])
def test_vmap_of_plans_is_refused(call: Callable[..., object]) -> None:
    with pytest.raises(RuntimeError, match=re.escape("plan_queries cannot be mapped by torch.func.vmap: each element")):
        vmap(call)(torch.zeros(2, 1, 1, 1, dtype=torch.int64))


@pytest.mark.parametrize("name", ["pool_queries", "unpool_queries", "ragged_attention", "ragged_attention's bias"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "forward mode"])
def test_other_derivatives_are_refused(name: str, transform: str) -> None:
    plan, x, rows = _data(torch.device("cpu"))
    calls = {
        "pool_queries": lambda t: dk.pool_queries(t[:, :36], plan),
        "unpool_queries": lambda t: dk.unpool_queries(rows[0], plan, t),
        "ragged_attention": lambda t: dk.ragged_attention(
            rows[0].unflatten(1, (3, 4)), t.unflatten(2, (3, 4)), t.unflatten(2, (3, 4)), plan
        ),
        "ragged_attention's bias": lambda t: dk.ragged_attention(
            rows[0].unflatten(1, (3, 4)), *[x[0].unflatten(2, (3, 4))] * 2, plan, bias=t[..., 0]
        ),
    }
    call = calls[name]
    function = name.split("'")[0]
    with pytest.raises(RuntimeError, match=f"dge_kernels.{function} is differentiable by torch.autograd only"):
        if transform == "grad":
            torch.func.grad(lambda t: call(t).sum())(x[0])
        elif transform == "jvp":
            torch.func.jvp(call, (x[0],), (x[1],))
        else:
            with forward_ad.dual_level():
                call(forward_ad.make_dual(x[0], x[1]))


def test_plain_compilation_captures_plans_in_one_graph() -> None:
    """``fullgraph=True`` allows sizes that depend on values; without it torch allows none by itself."""

    def pooled(x: Tensor, choice: Tensor) -> Tensor:
        plan = dk.plan_queries(choice, num_prefix_tokens=1)
        return dk.unpool_queries(dk.pool_queries(x, plan) * 2, plan, x)

    counter = CompileCounter()
    x, choice = torch.randn(2, 17, 8), torch.tensor([[[0]], [[2]]])
    torch.testing.assert_close(torch.compile(pooled, backend=counter)(x, choice), pooled(x, choice))
    assert counter.frame_count == 1
    torch.compiler.reset()
