from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from dpvt_written_out import attention, bilinear
from golden import DATA
from plain_models import stirred
from small_models import scatter_routing
from timm.layers import LayerNorm
from torch import Tensor

from dge_models.dpvt_block import (
    DeformableAttention,
    DeformableBlock,
    patch_centres,
    sample_packed_values,
    sample_values,
)
from dge_models.encoder import DGEBlock
from dge_models.static_layout import FixedLayout

GRID, WIDTH = (6, 9), 16


def _block(**kwargs: Any) -> DeformableBlock:
    block: DeformableBlock = stirred(
        DeformableBlock(WIDTH, 2, mlp_ratio=2, norm_layer=partial(LayerNorm, eps=1e-6), **kwargs)
    )
    with torch.no_grad():  # many points between tokens, some outside
        block.attn.offsets.bias.normal_(std=2.0)
    return block


def _tokens() -> Tensor:
    return torch.randn(2, GRID[0] * GRID[1], WIDTH)


def test_sampling_and_its_gradients_are_the_recorded_ones() -> None:
    recorded = {name: torch.from_numpy(value) for name, value in np.load(DATA / "bilinear_point.npz").items()}
    names = ("bilinear.input", "bilinear.grid", "bilinear_point.weight")
    values, points, weights = (recorded[name].requires_grad_() for name in names)
    out = sample_values(points.unsqueeze(2), weights.unsqueeze(2), values.unsqueeze(3)).squeeze(2)
    torch.testing.assert_close(out, recorded["bilinear_point.out"], atol=1e-6, rtol=0)
    gradients = torch.autograd.grad(out, (values, points, weights), recorded["bilinear_point.grad_out"])
    for name, gradient in zip(("input", "grid", "weight"), gradients, strict=True):
        torch.testing.assert_close(gradient, recorded[f"bilinear_point.grad_{name}"], atol=1e-6, rtol=0)


def test_sampling_is_differentiated_right() -> None:
    values = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(2, 5, 2, 3, 2, dtype=torch.float64) * 7 - 2).requires_grad_()
    weights = torch.rand(2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sample_values, (points, weights, values))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 3)])
def test_sampling_is_torchs_with_zeros_around(shape: tuple[int, int]) -> None:
    values = torch.randn(2, *shape, 3, 4)
    points = torch.rand(2, 50, 3, 4, 2) * 12 - 4
    points[0, 0], points[0, 1], points[0, 2] = -1.0, float(shape[0]), 1e9  # far away, and on whole numbers
    weights = torch.randn(2, 50, 3, 4)
    x, y = (part.transpose(1, 2).clamp(-9, 99) for part in points.unbind(-1))
    sampled = bilinear(values.permute(0, 3, 4, 1, 2), x, y)
    expected = (sampled * weights.transpose(1, 2).unsqueeze(2)).sum(-1).permute(0, 3, 1, 2)
    torch.testing.assert_close(sample_values(points, weights, values), expected)


def test_packed_queries_read_their_own_image() -> None:
    values, images = torch.randn(3, 4, 5, 2, 4), torch.tensor([0, 0, 1, 2, 2, 2])
    points, weights = torch.rand(6, 2, 4, 2) * 6 - 1, torch.rand(6, 2, 4)
    packed = sample_packed_values(points, weights, values, images)
    for query, image in enumerate(images.tolist()):
        own = slice(query, query + 1)
        alone = sample_values(points[own].unsqueeze(0), weights[own].unsqueeze(0), values[image : image + 1])
        torch.testing.assert_close(packed[own], alone[0])
    assert sample_packed_values(points[:0], weights[:0], values, images[:0]).shape == (0, 2, 4)


def test_what_is_no_number_stays_none_and_breaks_nothing() -> None:
    values, points = torch.randn(1, 3, 3, 1, 2), torch.ones(1, 2, 1, 1, 2)
    points[0, 0] = float("nan")
    out = sample_values(points, torch.ones(1, 2, 1, 1), values)
    assert out[0, 0].isnan().all()
    torch.testing.assert_close(out[0, 1, 0], values[0, 1, 1, 0])


@pytest.mark.parametrize("factor", [0.1, 1.0])
def test_attention_and_its_gradients_are_those_of_the_description(factor: float) -> None:
    attn = _block(offset_gradient=factor).attn.double()
    z = _tokens().double().requires_grad_()
    weights = {f"a.{name}": value for name, value in attn.named_parameters()}
    expected = attention(weights, "a", z, GRID, 2, factor)
    out = attn(z, GRID)
    torch.testing.assert_close(out, expected)
    inputs = (z, *attn.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for got, gradient in zip(torch.autograd.grad(out.square().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, gradient)


def test_positions_are_not_rounded_to_the_tokens_type() -> None:
    attn = DeformableAttention(8, 1, num_points=1).bfloat16()
    with torch.no_grad():
        attn.offsets.weight.zero_()
        attn.offsets.bias.fill_(0.25)
    points, weights = attn.points(torch.randn(1, 3, 8).bfloat16(), torch.tensor([1001, 2001]))
    assert points.dtype == weights.dtype == torch.float32
    assert attn(torch.randn(1, 6, 8).bfloat16(), (2, 3)).dtype == torch.bfloat16
    assert points.flatten(0, -2).unique(dim=0).tolist() == [[1001.25, 2001.25]]


def test_the_centre_of_a_patch_is_that_of_its_tokens() -> None:
    patches = torch.tensor([[0, 0, 1], [2, 4, 2], [4, 8, 4], [5, 8, 1]])
    expected = [[0.0, 0.0], [4.5, 2.5], [8.0, 4.5], [8.0, 5.0]]
    assert patch_centres(patches, GRID).tolist() == expected


@pytest.mark.parametrize("mode", ["dense", "sparse", "eval", "inference"])
def test_routed_at_the_finest_split_it_is_the_plain_block(mode: str) -> None:
    block, x = _block(), _tokens()
    expected = block(x, GRID)
    routed = DGEBlock.adopt(block, training_mode="sparse" if mode == "sparse" else "dense")
    with torch.no_grad():
        routed.router.gate.bias[0] = 100.0
    routed.train(mode in ("dense", "sparse"))
    with torch.set_grad_enabled(mode != "inference"):
        torch.testing.assert_close(routed(x, GRID), expected)


def test_a_pooled_query_reads_around_its_patchs_centre() -> None:
    """One query per region, written out: the mean token, points around the mean place, the same change for all."""
    block, x = _block(), _tokens()
    attn = block.attn
    routed = DGEBlock.adopt(block)
    with torch.no_grad():
        routed.router.gate.bias[2] = 100.0
        out, _ = routed.eval().forward_routed(x, GRID)
        maps, expected = x.unflatten(1, GRID), torch.empty(2, *GRID, WIDTH)
        values = attn.v(block.norm1(x)).view(2, *GRID, 2, 8)
        for top, bottom in ((0, 4), (4, 6)):
            for left, right in ((0, 4), (4, 8), (8, 9)):
                query = maps[:, top:bottom, left:right].mean((1, 2)).unsqueeze(1)
                centre = torch.tensor([(left + right - 1) / 2, (top + bottom - 1) / 2])
                points = centre + attn.offsets(block.norm1(query)).view(2, 1, 2, 4, 2)
                shares = attn.attn_weight(block.norm1(query)).view(2, 1, 2, 4).softmax(-1)
                hidden = query + attn.proj(sample_values(points, shares, values).flatten(2))
                change = hidden + block.mlp(block.norm2(hidden)) - query
                expected[:, top:bottom, left:right] = maps[:, top:bottom, left:right] + change.unsqueeze(1)
    torch.testing.assert_close(out, expected.flatten(1, 2))


def test_training_modes_and_fixed_queries_agree_and_reach_every_parameter() -> None:
    routed = scatter_routing(torch.nn.ModuleList([DGEBlock.adopt(_block())]))[0]
    assert isinstance(routed, DGEBlock)
    x, noise = _tokens()[:1], torch.zeros(1, 2, 3, 3)
    results = []
    for mode in ("dense", "sparse"):
        routed.training_mode = mode  # type: ignore[assignment]
        routed.train().zero_grad()
        out = routed(x, GRID, noise=noise)
        assert isinstance(out, Tensor)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), {name: p.grad.clone() for name, p in routed.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert gradient.abs().sum() > 0, name
        if not name.startswith("router."):
            torch.testing.assert_close(gradient, results[1][1][name], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        expected, routing = routed.eval().forward_routed(x, GRID)
        counts = routing.choice.flatten().bincount(minlength=3).tolist()
        assert min(counts[:2]) > 0
        routed.fixed_layout = FixedLayout(counts, GRID, (4, 2, 1), 0)
        torch.testing.assert_close(routed(x, GRID), expected)
    torch.testing.assert_close(results[0][0], expected)


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"b\.attn: attention dropout is 0\.1; expected 0"):
        DGEBlock.adopt(_block(attn_drop=0.1), "b")
    with pytest.raises(ValueError, match="num_heads: got 3; expected a divisor of the width, 16"):
        DeformableAttention(16, 3)
    with pytest.raises(ValueError, match="num_points: got 0; expected at least 1"):
        DeformableAttention(16, 2, num_points=0)
