from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from small_models import Build, build_small, scatter_routing
from timm.layers import set_fused_attn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dge_kernels.reference
from dge_models import count_macs, encoder, from_timm, trace
from dge_models.macs import model_macs

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def test_formula_written_out(small: Build) -> None:
    """One routed layer of width C, N tokens, Q queries, h heads, 4 regions."""
    model = small(depth=1)
    images = torch.randn(5, 3, 32, 32)
    count = count_macs(model, images)
    c, n, h, q = 32, 65, 2, trace(model, images).queries[0].double()
    norms = n * c + q * c
    projections = q * c**2 + 2 * n * c**2 + q * c**2
    attention = 2 * q * n * c + 3 * q * n * h
    mlp = 8 * q * c**2 + 4 * q * c
    router = 4 * c * (1 + 3)
    layer = norms + projections + attention + mlp + router
    torch.testing.assert_close(count.layers[0], layer, rtol=1e-12, atol=0)
    outside = 64 * (3 * 4 * 4) * c + 7 * c
    torch.testing.assert_close(count.total, layer + outside, rtol=1e-12, atol=0)
    assert count.layers.dtype == count.total.dtype == torch.float64


def test_static_is_every_region_at_its_finest(small: Build) -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for block in model.blocks:
            block.router.gate.weight.zero_()
            block.router.gate.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    count = count_macs(model, images)
    assert torch.equal(count.layers, count.static_layers.unsqueeze(1).expand(-1, 2))
    assert count.total.tolist() == [count.static_total] * 2


def test_unrouted_layers_cost_the_same_for_every_image(small: Build) -> None:
    count = count_macs(small(layers=[0]), torch.randn(3, 3, 32, 32))
    assert (count.layers[0] < count.static_layers[0]).any()
    assert torch.equal(count.layers[1:], count.static_layers[1:].unsqueeze(1).expand(-1, 3))


def test_training_mode_is_restored(small: Build) -> None:
    model = small().train()
    first, second = (count_macs(model, torch.ones(2, 3, 32, 32)) for _ in range(2))
    assert torch.equal(first.total, second.total)
    assert model.training


def _counted_by_formula(model: nn.Module, queries: list[int], tokens: int, pooled: int = 0) -> int:
    """Twice the MACs of matmuls, attention products and convolutions, from module shapes alone."""
    macs = pooled
    for block, count in zip(model.blocks, queries, strict=True):
        width = block.attn.qkv.in_features
        mlp = sum(m.in_features * m.out_features for m in block.mlp.modules() if isinstance(m, nn.Linear))
        macs += 2 * tokens * width**2 + count * (2 * width**2 + 2 * tokens * width + mlp)
    grid = model.patch_embed.grid_size
    macs += grid[0] * grid[1] * model.patch_embed.proj.weight.numel()
    return 2 * macs


def _flops(model: nn.Module, images: torch.Tensor) -> int:
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", {"img_size": 96}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 96}),
    "swiglu": ("vit_giant_patch14_dinov2", {"img_size": 84}),
    "map_pool": ("vit_base_patch16_siglip_224", {"img_size": 96}),
}


@pytest.mark.parametrize("case", CASES)
def test_dense_counts_agree_with_torchs_counter(case: str) -> None:
    """What torch leaves out (norms, softmax, activations) is small here and is subtracted by formula."""
    name, kwargs = CASES[case]
    set_fused_attn(False)  # torch does not count the CPU's fused attention
    try:
        model = timm.create_model(name, **{**TINY, **kwargs}).eval()
    finally:
        set_fused_attn(True)
    images = torch.randn(1, 3, kwargs["img_size"], kwargs["img_size"])
    grid = model.patch_embed.grid_size
    tokens = model.num_prefix_tokens + grid[0] * grid[1]
    macs = model_macs(model, grid)
    hidden = model.blocks[0].mlp.fc1.out_features
    uncounted = sum(2 * tokens * 48 + tokens * (3 * tokens * 3 + hidden) for _ in macs.layers)
    counted = macs.static - uncounted
    assert counted * 2 == pytest.approx(_flops(model, images), rel=0.01)
    assert count_macs(model, images).total.tolist() == [macs.static]


def test_dynamic_counts_agree_with_torchs_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention in plain PyTorch, so that torch's counter sees its products."""
    monkeypatch.setattr(encoder, "ragged_attention", dge_kernels.reference.ragged_attention)
    model = timm.create_model("deit_dge_s124_tiny_patch16_256", img_size=112, drop_path_rate=0.1, **TINY).eval()
    scatter_routing(model)
    images = torch.randn(1, 3, 112, 112)
    result = trace(model, images)
    queries = result.queries[:, 0].tolist()
    tokens = 1 + 49
    assert len(set(queries)) > 1
    assert queries != [tokens] * 2
    uncounted = sum(48 * (tokens + q) + q * (3 * tokens * 3 + 4 * 48) + 4 * 48 * 4 for q in queries)
    assert (result.macs[0].item() - uncounted) * 2 == pytest.approx(_flops(model, images), rel=0.01)
    routers = 2 * 4 * 48 * 3  # layers, regions, channels, splits
    by_formula = _counted_by_formula(model, queries, tokens, pooled=48 * 5) + 2 * routers
    assert by_formula == pytest.approx(_flops(model, images), rel=1e-6)


def test_a_converted_model_adds_its_routers_alone() -> None:
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, **TINY)
    images = torch.randn(2, 3, 64, 64)
    routers = 2 * 1 * 48 * (1 + 3)
    assert count_macs(from_timm(model), images).static_total == count_macs(model, images).static_total + routers


PVT = "pvt_dge_s124_tiny_256"


def test_formula_of_a_pyramid_written_out(small: Build) -> None:
    """Stages of 16 × 16, 8 × 8 (two blocks), 4 × 4 and 2 × 2 + 1 tokens; each leaves 2 × 2 keys, the last all 5."""
    model, images = small(PVT), torch.randn(3, 3, 64, 64)
    count, queries = count_macs(model, images), trace(model, images).queries.double()
    stages = [(256, 8, 1, 8, 4), (64, 16, 2, 4, 4), (64, 16, 2, 4, 4), (16, 24, 3, 2, 4), (5, 32, 4, 1, 5)]
    for layer, (n, c, h, r, m) in enumerate(stages):
        q = queries[layer]
        regions = max(n // 16, 1)
        fixed = n * c + 2 * m * c**2 + regions * 4 * c + ((n * c**2 + m * c) if r > 1 else 0)
        per_query = c + 2 * c**2 + 2 * m * c + 3 * m * h + 2 * 2 * c**2 + 2 * c
        torch.testing.assert_close(count.layers[layer], fixed + q * per_query, rtol=1e-12, atol=0)
        assert count.static_layers[layer] == fixed + n * per_query
    embed = [(256, 48, 8), (64, 8 * 4, 16), (16, 16 * 4, 24), (4, 24 * 4, 32)]
    outside = sum(n * (wide * c + c) for n, wide, c in embed) + 32 * 7
    torch.testing.assert_close(count.total, count.layers.sum(0) + outside, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["pvt_tiny_256", PVT])
@pytest.mark.parametrize("size", [(64, 64), (75, 130)])
def test_pyramid_counts_agree_with_torchs_counter(
    monkeypatch: pytest.MonkeyPatch, name: str, size: tuple[int, int]
) -> None:
    """On what torch counts: products, attention, convolutions. Here the rest is subtracted by formula."""
    monkeypatch.setattr(encoder, "ragged_attention", dge_kernels.reference.ragged_attention)
    set_fused_attn(False)
    try:
        model = build_small(name, num_classes=0)
    finally:
        set_fused_attn(True)
    images = torch.randn(1, 3, *size)
    count = count_macs(model, images)
    grids = [(size[0] // stride, size[1] // stride) for stride in (4, 8, 8, 16, 32)]
    tokens = [rows * cols + (index == 4) for index, (rows, cols) in enumerate(grids)]
    queries = trace(model, images).queries[:, 0].tolist() if name == PVT else tokens
    assert (queries != tokens) == (name == PVT)
    uncounted = 0.0
    blocks = [block for stage in model.stages for block in stage.blocks]
    for block, grid, n, q, r in zip(blocks, grids, tokens, queries, (8, 4, 4, 2, 1), strict=True):
        width, keys = block.norm1.normalized_shape[0], (grid[0] // r) * (grid[1] // r) if r > 1 else n
        reduction_norm = keys * width if r > 1 else 0
        uncounted += (n + q) * width + reduction_norm + 3 * q * keys * block.attn.num_heads
        uncounted += q * block.mlp.fc1.out_features
        if name == PVT:
            uncounted += -(-grid[0] // 4) * -(-grid[1] // 4) * width  # the regions' means; their logits are products
    uncounted += sum(grids[index][0] * grids[index][1] * width for index, width in ((0, 8), (1, 16), (3, 24), (4, 32)))
    flops = _flops(model, images) + (_logit_flops(model, grids) if name == PVT else 0)
    assert (count.total[0].item() - uncounted) * 2 == pytest.approx(flops, rel=0.01)


def _logit_flops(model: nn.Module, grids: list[tuple[int, int]]) -> int:
    """What torch's counter can't see of the routers: their fused kernel."""
    blocks = [block for stage in model.stages for block in stage.blocks]
    widths = [block.norm1.normalized_shape[0] for block in blocks]
    return 2 * sum(-(-h // 4) * -(-w // 4) * width * 3 for (h, w), width in zip(grids, widths, strict=True))


@pytest.mark.parametrize("name", ["pvt_tiny_256", PVT])
def test_published_pyramids_static_count(name: str) -> None:
    """PVT-Tiny is known as a model of 1.9 G at 224 pixels; 256 pixels have 1.31 times as many."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model_macs(model, (56, 56)).static == pytest.approx(1.9e9, rel=0.03)
    assert model_macs(model, (64, 64)).static == pytest.approx(1.9e9 * (256 / 224) ** 2, rel=0.05)


def test_models_of_unknown_cost_are_refused() -> None:
    with pytest.raises(ValueError, match="model: got Linear; expected a vision transformer"):
        count_macs(nn.Linear(2, 2), torch.randn(1, 3, 8, 8))
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", **TINY)
    with pytest.raises(ValueError, match="embeds with HybridEmbed"):
        count_macs(hybrid, torch.randn(1, 3, 224, 224))
