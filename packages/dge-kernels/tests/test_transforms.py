"""torch.func: vmap is supported where it makes sense and refused where not; its derivatives are refused."""

import re
from collections.abc import Callable

import pytest
import torch
from cases import Case
from torch import Tensor
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


@pytest.mark.parametrize("name", ["pool_queries", "unpool_queries", "ragged_attention"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "forward mode"])
def test_other_derivatives_are_refused(name: str, transform: str) -> None:
    plan, x, rows = _data(torch.device("cpu"))
    calls = {
        "pool_queries": lambda t: dk.pool_queries(t[:, :36], plan),
        "unpool_queries": lambda t: dk.unpool_queries(rows[0], plan, t),
        "ragged_attention": lambda t: dk.ragged_attention(
            rows[0].unflatten(1, (3, 4)), t.unflatten(2, (3, 4)), t.unflatten(2, (3, 4)), plan
        ),
    }
    call = calls[name]
    with pytest.raises(RuntimeError, match=f"dge_kernels.{name} is differentiable by torch.autograd only"):
        if transform == "grad":
            torch.func.grad(lambda t: call(t).sum())(x[0])
        elif transform == "jvp":
            torch.func.jvp(call, (x[0],), (x[1],))
        else:
            with forward_ad.dual_level():
                call(forward_ad.make_dual(x[0], x[1]))
