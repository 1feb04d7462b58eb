from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from small_models import scatter_routing
from timm.layers import LayerNorm
from torch import Tensor

from dge_models.attention import full_attention
from dge_models.encoder import DGEBlock
from dge_models.pvt_block import PyramidBlock, reduce_tokens

GRID, WIDTH = (6, 9), 16


@pytest.mark.parametrize("sr_ratio", [1, 2, 3])
def test_attending_to_oneself_over_reduced_tokens_is_timms_attention(sr_ratio: int) -> None:
    block = DGEBlock.adopt(PyramidBlock(24, 3, sr_ratio)).eval()
    attn: Any = block.attn
    x = torch.randn(2, 5 * 7, 24)
    kernel = partial(full_attention, scale=attn.scale)
    out = block.attend(x, block.make_keys(x, (5, 7), None), kernel, None, lambda: x)
    torch.testing.assert_close(out, attn(x, (5, 7)))
    assert reduce_tokens(attn, x, (5, 7)).shape == (2, (5 // sr_ratio) * (7 // sr_ratio), 24)


def _block(sr_ratio: int) -> PyramidBlock:
    return PyramidBlock(WIDTH, 2, sr_ratio, norm_layer=partial(LayerNorm, eps=1e-6))


def _tokens(prefix: int = 0) -> Tensor:
    return torch.randn(2, prefix + GRID[0] * GRID[1], WIDTH)


@pytest.mark.parametrize("sr_ratio", [1, 2, 4])
def test_it_computes_what_the_paper_says(sr_ratio: int) -> None:
    """Written out with plain functions; a grid that R does not divide loses its last rows and columns."""
    block, x = _block(sr_ratio), _tokens()
    normed = torch.nn.functional.layer_norm(x, (WIDTH,), block.norm1.weight, block.norm1.bias, 1e-6)
    keys_from = normed
    if sr_ratio > 1:
        image = normed.transpose(1, 2).reshape(2, WIDTH, *GRID)
        reduced = torch.nn.functional.conv2d(image, block.attn.sr.weight, block.attn.sr.bias, stride=sr_ratio)
        assert reduced.shape[2:] == (GRID[0] // sr_ratio, GRID[1] // sr_ratio)
        norm = block.attn.norm
        keys_from = torch.nn.functional.layer_norm(
            reduced.flatten(2).transpose(1, 2), (WIDTH,), norm.weight, norm.bias, 1e-5
        )
    keys, values = block.attn.kv(keys_from).split(WIDTH, dim=-1)
    heads = [part.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for part in (block.attn.q(normed), keys, values)]
    scores = (heads[0] @ heads[1].transpose(-2, -1) / (WIDTH // 2) ** 0.5).softmax(-1)
    x_mid = x + block.attn.proj((scores @ heads[2]).transpose(1, 2).flatten(2))
    expected = x_mid + block.mlp(block.norm2(x_mid))
    torch.testing.assert_close(block(x, GRID), expected)


@pytest.mark.parametrize(("sr_ratio", "prefix"), [(1, 1), (2, 0), (4, 0)])
@pytest.mark.parametrize("mode", ["dense", "sparse", "eval", "inference"])
def test_routed_at_the_finest_split_it_is_the_plain_block(sr_ratio: int, prefix: int, mode: str) -> None:
    block, x = _block(sr_ratio), _tokens(prefix)
    expected = block(x, GRID, prefix)
    routed = DGEBlock.adopt(block, training_mode="sparse" if mode == "sparse" else "dense")
    with torch.no_grad():
        routed.router.gate.bias[0] = 100.0
    routed.train(mode in ("dense", "sparse"))
    with torch.set_grad_enabled(mode != "inference"):
        torch.testing.assert_close(routed(x, GRID, prefix), expected)


def test_keys_come_from_dense_tokens_however_coarse_the_queries_are() -> None:
    """One query per region; its keys and values are those of the plain block."""
    block, x = _block(2), _tokens()
    keys: list[Tensor] = []
    block.attn.kv.register_forward_hook(lambda _module, args, _out: keys.append(args[0]))
    block(x, GRID)
    routed = DGEBlock.adopt(block)
    with torch.no_grad():
        routed.router.gate.bias[2] = 100.0
        _, routing = routed.eval().forward_routed(x, GRID)
    assert routing.queries.tolist() == [2 * 3] * 2
    torch.testing.assert_close(keys[0], keys[1])
    assert keys[0].shape == (2, 3 * 4, WIDTH)


@pytest.mark.parametrize("sr_ratio", [1, 2])
def test_training_modes_agree_and_reach_every_parameter(sr_ratio: int) -> None:
    routed = scatter_routing(torch.nn.ModuleList([DGEBlock.adopt(_block(sr_ratio))]))[0]
    assert isinstance(routed, DGEBlock)
    x, noise = _tokens(), torch.randn(2, 2, 3, 3)
    results = []
    for mode in ("dense", "sparse"):
        routed.training_mode = mode  # type: ignore[assignment]
        routed.zero_grad()
        out = routed(x, GRID, noise=noise)
        assert isinstance(out, Tensor)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), {name: p.grad.clone() for name, p in routed.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert gradient.abs().sum() > 0, name
        if not name.startswith("router."):
            torch.testing.assert_close(gradient, results[1][1][name], atol=1e-5, rtol=1e-4)


def test_attention_dropout_and_linear_attention_are_refused() -> None:
    with pytest.raises(ValueError, match=r"b\.attn: attention dropout is 0\.1"):
        DGEBlock.adopt(PyramidBlock(WIDTH, 2, 2, attn_drop=0.1), "b")
    strange = _block(2)
    strange.attn.act = torch.nn.GELU()
    with pytest.raises(ValueError, match=r"unknown parts \['act'\]"):
        DGEBlock.adopt(strange)
