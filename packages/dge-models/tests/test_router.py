from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from dge_models.router import Router, deterministic_routing, gumbel_noise, region_means, split_costs


def _slow_means(x: torch.Tensor, size: int) -> torch.Tensor:
    rows = [
        torch.stack([x[:, y : y + size, c : c + size].mean((1, 2)) for c in range(0, x.shape[2], size)], 1)
        for y in range(0, x.shape[1], size)
    ]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (5, 9), (1, 1), (2, 3)])
def test_region_means_are_over_the_tokens_that_exist(grid: tuple[int, int]) -> None:
    x = torch.randn(2, *grid, 5, dtype=torch.float64)
    torch.testing.assert_close(region_means(x, 4), _slow_means(x, 4))


def test_region_means_of_half_types_are_accumulated_in_float32() -> None:
    x = (torch.randn(1, 8, 8, 6) + 100).bfloat16()
    means = region_means(x, 4)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, _slow_means(x.float(), 4))


def test_finest_split_starts_at_95_percent() -> None:
    router = Router(64, (4, 2, 1))
    assert router.gate.weight.std().item() == pytest.approx(0.01, rel=0.2)
    torch.testing.assert_close(router.gate.bias.softmax(0), torch.tensor([0.95, 0.025, 0.025]))


def test_a_single_split_starts_without_bias() -> None:
    assert torch.equal(Router(8, (4,)).gate.bias, torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_choice_without_gradient_is_the_argmax_of_the_logits(dtype: torch.dtype) -> None:
    router = Router(16).to(dtype).eval()
    torch.nn.init.normal_(router.gate.weight)
    x = torch.randn(3, 2 + 5 * 9, 16).to(dtype)
    logits = router.logits(x, (5, 9), 2)
    assert logits.dtype == torch.float32
    assert torch.equal(router.choose(x, (5, 9), 2).long(), logits.argmax(-1))
    assert torch.equal(router(x, (5, 9), 2).choice.long(), logits.argmax(-1))


def test_logits_stay_float32_under_autocast() -> None:
    router = Router(16)
    x = torch.randn(2, 64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router.logits(x, (8, 8))
        routing = router(x, (8, 8), noise=router.draw_noise(2, (8, 8), x.device))
    assert torch.equal(logits, router.logits(x, (8, 8)))
    assert routing.gate.dtype == routing.queries.dtype == torch.float32


def test_noise_is_that_of_torch_for_the_same_seed() -> None:
    logits = torch.randn(2, 2, 2, 3)
    torch.manual_seed(5)
    expected = torch.nn.functional.gumbel_softmax(logits, hard=True)
    torch.manual_seed(5)
    noise = gumbel_noise((2, 2, 2, 3), torch.device("cpu"))
    assert torch.equal((logits + noise).argmax(-1), expected.argmax(-1))


def test_noise_is_drawn_in_training_alone() -> None:
    router = Router(8)
    device = torch.device("cpu")
    first, second = (router.draw_noise(3, (5, 8), device) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.shape == (3, 2, 2, 3)
    assert not torch.equal(first, second)
    assert router.eval().draw_noise(3, (5, 8), device) is None


def test_deterministic_routing_is_noise_of_zeros_and_ends_with_its_block() -> None:
    router, device = Router(8), torch.device("cpu")

    def drawn() -> torch.Tensor:
        noise = router.draw_noise(1, (4, 4), device)
        assert noise is not None
        return noise

    with deterministic_routing():
        with deterministic_routing():
            assert not drawn().any()
        assert not drawn().any()
    assert drawn().any()


def test_given_noise_decides() -> None:
    router = Router(8)
    noise = torch.zeros(1, 2, 2, 3)
    noise[..., 2] = 100
    assert torch.equal(
        router(torch.randn(1, 64, 8), (8, 8), noise=noise).choice, torch.full((1, 2, 2), 2, dtype=torch.uint8)
    )


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise: got shape \(1, 3, 2, 3\); expected \(1, 2, 2, 3\)"):
        Router(8)(torch.randn(1, 64, 8), (8, 8), noise=torch.zeros(1, 3, 2, 3))


def test_queries_carry_a_gradient_to_the_router() -> None:
    router = Router(8)
    routing = router(torch.randn(2, 1 + 64, 8), (8, 8), 1)
    routing.queries.sum().backward()
    assert router.gate.weight.grad is not None
    assert router.gate.weight.grad.abs().sum() > 0


def test_shift_moves_training_logits_by_cost_and_nothing_else() -> None:
    router, x = Router(8).train(), torch.randn(2, 16, 8)
    noise = torch.zeros(2, 1, 1, 3)
    plain = router(x, (4, 4), noise=noise).logits
    router.shift_training(-2.0)
    shifted = router(x, (4, 4), noise=noise).logits
    torch.testing.assert_close(shifted - plain, torch.tensor([-2.0, -0.5, -0.125]).expand(2, 1, 1, 3))
    torch.testing.assert_close(router.logits(x, (4, 4)), plain)
    torch.testing.assert_close(router.eval()(x, (4, 4)).logits, plain)
    assert "shift" not in router.state_dict()
    router.train().shift_training(None)
    assert torch.equal(router(x, (4, 4), noise=noise).logits, plain)


def test_shift_follows_the_routers_device_and_is_copied() -> None:
    router = Router(8)
    router.shift_training(1.0)
    assert router.to("meta").shift.device.type == "meta"
    twin = Router(8)
    twin.shift_training(3.0)
    clone = copy.deepcopy(twin)
    twin.shift_training(5.0)
    assert clone.shift.tolist() == [3.0, 0.75, 0.1875]


def test_logits_without_noise_are_reported() -> None:
    router, x = Router(8).train(), torch.randn(2, 16, 8)
    noise = torch.randn(2, 1, 1, 3) * 10
    routing = router(x, (4, 4), noise=noise)
    torch.testing.assert_close(routing.logits, router.logits(x, (4, 4)))
    assert not routing.logits.requires_grad
    assert torch.equal((routing.logits + noise).argmax(-1), routing.choice.long())


def test_costs_of_splits() -> None:
    assert split_costs((4, 2, 1)).tolist() == [1.0, 0.25, 0.0625]
    assert split_costs((2, 1)).tolist() == [1.0, 0.25]


class _Same(nn.Linear):
    """Not plain, and no different."""


def _hooked(gate: nn.Linear) -> None:
    gate.register_forward_hook(lambda module, args, out: None)


def _pruned(gate: nn.Linear) -> None:
    prune.random_unstructured(gate, "weight", amount=0)


def _normalised(gate: nn.Linear) -> None:
    parametrizations.weight_norm(gate)


def _subclassed(gate: nn.Linear) -> None:
    gate.__class__ = _Same


@pytest.mark.parametrize("how", [_hooked, _pruned, _normalised, _subclassed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gate_that_is_not_plain_is_called(how: Callable[[nn.Linear], None], dtype: torch.dtype) -> None:
    router = Router(8, dtype=dtype)
    with torch.no_grad():
        router.gate.weight.normal_()
        router.gate.bias.zero_()
    x = torch.randn(2, 65, 8, dtype=dtype)
    logits, choice = router.logits(x, (8, 8), 1), router.choose(x, (8, 8), 1)
    how(router.gate)
    got = router.logits(x, (8, 8), 1)
    assert got.dtype == logits.dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5  # called in its own dtype
    torch.testing.assert_close(got, logits, atol=tolerance, rtol=tolerance)
    assert router.choose(x, (8, 8), 1).dtype == torch.uint8
    assert torch.equal(router.choose(x, (8, 8), 1).long(), got.argmax(-1))
    if dtype != torch.bfloat16:
        assert torch.equal(router.choose(x, (8, 8), 1), choice)


def test_what_a_hook_does_to_a_gate_is_what_is_chosen() -> None:
    router, x = Router(8).eval(), torch.randn(2, 16, 8)
    assert router.choose(x, (4, 4)).unique().tolist() == [0]
    router.gate.register_forward_hook(lambda module, args, out: out + torch.tensor([0.0, 0.0, 100.0]))
    assert router.choose(x, (4, 4)).unique().tolist() == [2]
    assert router(x, (4, 4)).choice.unique().tolist() == [2]


def test_logits_have_a_shape_on_the_meta_device() -> None:
    router = Router(8, device="meta")
    assert router.logits(torch.randn(2, 16, 8, device="meta"), (4, 4)).shape == (2, 1, 1, 3)


def test_logits_in_an_onnx_export_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    router, means = Router(6, (4, 2, 1)), torch.randn(2, 3, 5, 6)
    nn.init.normal_(router.gate.bias)
    expected = router.logits_of(means)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(nn.functional, "linear", None)  # not called
    torch.testing.assert_close(router.logits_of(means), expected)
