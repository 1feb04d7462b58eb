from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import scatter_routing
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from dge_models.encoder import DGEBlock, set_training_mode
from dge_models.router import gumbel_noise

GRID, PREFIX, WIDTH = (7, 9), 2, 16


def _block(mode: str = "sparse", **kwargs: Any) -> DGEBlock:
    block = DGEBlock(WIDTH, num_heads=2, qkv_bias=True, training_mode=mode, **kwargs)
    scatter_routing(block)
    return block


def _tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, PREFIX + GRID[0] * GRID[1], WIDTH)


def _noise(batch: int = 2) -> Tensor:
    return gumbel_noise((batch, 2, 3, 3), torch.device("cpu"))


@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": 0.1}, {"qk_norm": True}, {"mlp_layer": SwiGLUPacked}, {"qkv_bias": False}],
)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_at_the_finest_split_it_is_timms_block(options: dict[str, Any], mode: str) -> None:
    plain = Block(WIDTH, **{"num_heads": 2, "qkv_bias": True, **options})
    x = _tokens()
    expected = plain(x)
    block = DGEBlock.adopt(plain, training_mode=mode)
    assert isinstance(block, DGEBlock)
    finest = torch.zeros(2, 2, 3, 3)
    finest[..., 0] = 100
    torch.testing.assert_close(block(x, GRID, PREFIX, noise=finest), expected)
    torch.testing.assert_close(block.eval()(x, GRID, PREFIX), expected)
    with torch.no_grad():
        torch.testing.assert_close(block(x, GRID, PREFIX), expected)


def _gradients(block: DGEBlock, x: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = block(x, GRID, PREFIX, noise=noise)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return out.detach(), gradients


def test_both_training_modes_agree_in_value_and_in_all_gradients_but_the_routers() -> None:
    block, x, noise = _block(), _tokens(), _noise()
    out, sparse = _gradients(block, x, noise)
    set_training_mode(block, "dense")
    dense_out, dense = _gradients(block, x, noise)
    torch.testing.assert_close(out, dense_out)
    assert sparse.keys() == dense.keys() == dict(block.named_parameters()).keys()
    for name in sparse:
        if not name.startswith("router."):
            torch.testing.assert_close(sparse[name], dense[name], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(sparse["router.gate.weight"], dense["router.gate.weight"])


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_router_gradient_is_that_of_a_soft_mixture_at_the_hard_gates(mode: str) -> None:
    """The change of region r enters the output gate times; so d(loss)/d(gate) is the loss's slope along it."""
    block, x = _block(mode).double(), _tokens(1).double()
    noise = _noise(1).double()
    weight = torch.randn_like(x)
    _, routing = block.forward_routed(x, GRID, PREFIX, noise=noise)
    logits = (block.router.logits(x, GRID, PREFIX) + noise).detach().requires_grad_()
    soft = logits.softmax(-1)
    gains = torch.zeros_like(soft)
    options = range(3) if mode == "dense" else [None]
    for row in range(2):
        for col in range(3):
            area = torch.zeros(*GRID, dtype=torch.bool)
            area[row * 4 : row * 4 + 4, col * 4 : col * 4 + 4] = True
            for option in options:
                index = int(routing.choice[0, row, col]) if option is None else option
                forced = routing.choice.clone().long()
                forced[0, row, col] = index
                one_hot = torch.nn.functional.one_hot(forced, 3).double() * 1000
                change = block(x, GRID, PREFIX, noise=one_hot) - x
                gains[0, row, col, index] = (change * weight)[:, PREFIX:][:, area.flatten()].sum().detach()
    (soft * gains).sum().backward()
    bias = block.router.gate.bias
    (got,) = torch.autograd.grad((block(x, GRID, PREFIX, noise=noise) * weight).sum(), bias)
    assert logits.grad is not None
    torch.testing.assert_close(got, logits.grad.sum((0, 1, 2)))


def test_evaluation_differentiates_and_agrees_with_inference() -> None:
    block, x = _block().eval(), _tokens().requires_grad_()
    out, routing = block.forward_routed(x, GRID, PREFIX)
    with torch.no_grad():
        fast, fast_routing = block.forward_routed(x, GRID, PREFIX)
    torch.testing.assert_close(out, fast, atol=1e-6, rtol=0)
    assert torch.equal(routing.choice, fast_routing.choice)
    assert torch.equal(routing.gate, fast_routing.gate)
    assert torch.equal(routing.queries, fast_routing.queries)
    assert len(routing.choice.unique()) == 3
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert x.grad is not None


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_every_parameter_gets_a_gradient(mode: str) -> None:
    block = _block(mode, init_values=1e-2, qk_norm=True)
    block(_tokens(), GRID, PREFIX).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_gradients_match_numeric_ones() -> None:
    block = _block().double().eval()
    x = torch.randn(1, 1 + 4, WIDTH, dtype=torch.float64, requires_grad=True)
    for parameter in block.router.parameters():
        parameter.requires_grad_(False)  # its straight-through gradient is not the slope of a step function
    with torch.no_grad():
        block.router.gate.weight.zero_()
    assert torch.autograd.gradcheck(lambda x: block(x, (2, 2), 1), (x,))


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("drop", ["query", "image"])
def test_drop_path_drops_what_it_says(mode: str, drop: str) -> None:
    block = _block(mode, drop_path=0.5, drop_path_mode=drop)
    noise = torch.zeros(64, 1, 1, 3)
    noise[..., 0] = 100
    x = torch.randn(64, 1 + 16, WIDTH)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    changed = (block(x, (4, 4), 1, noise=noise) - x).abs().sum(-1) > 1e-6
    per_image = changed.float().mean(1)
    assert 0.3 < changed.float().mean() < 0.7
    if drop == "image":
        assert set(per_image.tolist()) == {0.0, 1.0}
    else:
        assert ((per_image > 0) & (per_image < 1)).sum() > 50


def test_no_drop_path_in_evaluation() -> None:
    block, x = _block(drop_path=0.9).eval(), _tokens()
    assert torch.equal(block(x, GRID, PREFIX), block(x, GRID, PREFIX))


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_keep_their_dtype(mode: str, dtype: torch.dtype) -> None:
    block, x = _block(mode).to(dtype), _tokens().to(dtype)
    out, routing = block.forward_routed(x, GRID, PREFIX)
    assert out.dtype == dtype
    assert routing.gate.dtype == torch.float32
    out.float().square().mean().backward()
    with torch.no_grad():
        assert block.eval()(x, GRID, PREFIX).dtype == dtype


@pytest.mark.parametrize("mode", ["dense", "sparse", "eval"])
def test_an_empty_batch_gives_an_empty_result(mode: str) -> None:
    block = _block("sparse").eval() if mode == "eval" else _block(mode)
    out, routing = block.forward_routed(_tokens(0), GRID, PREFIX)
    assert out.shape == (0, PREFIX + 63, WIDTH)
    assert routing.queries.shape == (0,)
    with torch.no_grad():
        assert block(_tokens(0), GRID, PREFIX).shape == out.shape


def test_hooks_see_tokens_and_run_for_both_ways_in() -> None:
    block, seen = _block().eval(), []
    block.register_forward_hook(lambda *args: seen.append(args[-1]))
    block(_tokens(), GRID, PREFIX)
    block.forward_routed(_tokens(), GRID, PREFIX)
    assert isinstance(seen[0], Tensor)
    assert len(seen) == 2


def test_noise_in_evaluation_is_refused() -> None:
    with pytest.raises(ValueError, match="noise: got a tensor in evaluation mode"):
        _block().eval()(_tokens(), GRID, PREFIX, noise=_noise())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"training_mode": "both"}, "training_mode: got 'both'; expected one of 'dense', 'sparse'"),
        ({"drop_path_mode": "token"}, "drop_path_mode: got 'token'"),
        ({"splits": (4, 3)}, r"splits: got \(4, 3\)"),
        ({"attn_drop": 0.1}, "attention dropout is 0.1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DGEBlock(WIDTH, num_heads=2, **options)


def test_other_blocks_and_a_second_adoption_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.1: got ResPostBlock"):
        DGEBlock.adopt(ResPostBlock(WIDTH, num_heads=2), "blocks.1")
    with pytest.raises(ValueError, match="routed already"):
        DGEBlock.adopt(_block())
    strange = Block(WIDTH, num_heads=2)
    strange.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"unknown parts \['extra'\]"):
        DGEBlock.adopt(strange)


def test_a_refused_block_is_left_as_it_was() -> None:
    block = Block(WIDTH, num_heads=2)
    with pytest.raises(ValueError, match="splits"):
        DGEBlock.adopt(block, splits=(3, 2))
    assert type(block) is Block
    assert not hasattr(block, "router")


def test_setting_the_training_mode() -> None:
    model = nn.Sequential(_block(), _block())
    set_training_mode(model, "dense")
    assert [block.training_mode for block in model] == ["dense", "dense"]
    with pytest.raises(ValueError, match="mode: got 'fast'"):
        set_training_mode(model, "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no routed block"):
        set_training_mode(nn.Linear(2, 2), "dense")
