"""Conversion of timm's Eva: rotary embeddings, split and fused projections, the ViTs of DINOv3, EVA-02 and PE."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from plain_models import stirred
from small_models import scatter_routing
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models._features_fx import create_feature_extractor
from timm.models.eva import Eva
from torch import nn

from dge_kernels import plan_queries, pool_queries
from dge_models import (
    BudgetLoss,
    DGEEva,
    count_macs,
    deterministic_routing,
    from_timm,
    load_checkpoint,
    save_pretrained,
    set_budget,
    set_fixed_queries,
    set_training_mode,
    trace,
)
from dge_models.eva import rotations
from dge_models.routed import routed_blocks

SHORT: dict[str, Any] = {"img_size": 112, "depth": 2, "num_classes": 5}
TINY: dict[str, Any] = {**SHORT, "embed_dim": 64, "num_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov3": ("vit_small_patch16_dinov3", TINY),
    "dinov3_bias": ("vit_small_patch16_dinov3_qkvb", TINY),
    "dinov3_swiglu": ("vit_small_plus_patch16_dinov3", TINY),
    "eva02": ("eva02_tiny_patch14_224", TINY),
    "eva02_large": ("eva02_large_patch14_224", TINY),
    "eva": ("eva_giant_patch14_224", TINY),
    "perception": ("vit_pe_core_tiny_patch16_384", TINY),
    "perception_lang": ("vit_pe_lang_large_patch14_448", TINY),
    "rope": ("vit_base_patch16_rope_224", TINY),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", TINY),
    "rope_ape": ("vit_small_patch16_rope_ape_224", TINY),
    "registers": ("vit_medium_patch16_rope_reg1_gap_256", TINY),
}
if "num_kv_heads" in inspect.signature(Eva).parameters:  # in newer releases of timm
    _grouped = {**TINY, "num_heads": 4, "num_kv_heads": 2, "qkv_fused": False, "qk_norm": True}
    MODELS["grouped_keys"] = ("vit_base_patch16_rope_224", _grouped)


def _build(case: str, **kwargs: Any) -> Any:
    name, settings = MODELS[case]
    torch.manual_seed(0)
    return stirred(timm.create_model(name, **{**settings, **kwargs}))


def _images(batch: int = 2, height: int = 112, width: int = 112) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_the_cases_are_what_they_are_for() -> None:
    kinds = {case: _build(case) for case in MODELS}
    attentions = {case: model.blocks[0].attn for case, model in kinds.items()}
    assert all(type(model) is Eva for model in kinds.values())
    assert {type(attn).__name__ for attn in attentions.values()} == {"EvaAttention", "AttentionRope"}
    assert attentions["eva02_large"].qkv is None
    assert attentions["eva"].q_bias is not None
    assert kinds["eva"].rope is None
    assert kinds["rope_mixed"].rope_mixed
    assert attentions["dinov3"].rotate_half
    assert kinds["dinov3"].num_prefix_tokens == 5
    assert kinds["dinov3"].blocks[0].gamma_1 is not None
    assert kinds["perception"].attn_pool is not None
    assert "grouped_keys" not in attentions or attentions["grouped_keys"].num_kv_groups == 2
    assert {type(model.rope).__name__ for model in kinds.values()} >= {"RotaryEmbeddingDinoV3", "RotaryEmbeddingCat"}
    assert isinstance(kinds["eva02_large"].blocks[0].mlp.norm, nn.LayerNorm)


@pytest.mark.parametrize("case", MODELS)
def test_converted_models_compute_the_same(case: str) -> None:
    model = _build(case)
    converted = from_timm(model)
    assert type(converted) is DGEEva
    images = _images()
    expected = model(images)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            out = converted(images)
        assert (out - expected).abs().max() <= 2e-6 * max(1, expected.abs().max())
    features, maps = converted.forward_intermediates(images)
    expected_features, expected_maps = model.forward_intermediates(images)
    torch.testing.assert_close(features, expected_features, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(maps, expected_maps, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(converted.forward_features(images), model.forward_features(images), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("case", MODELS)
def test_queries_are_placed_alike_in_every_mode(case: str) -> None:
    converted: Any = scatter_routing(from_timm(_build(case)))
    images = _images(3)
    with torch.no_grad():
        expected = converted(images)
        assert len(torch.stack(trace(converted, images).granularity).unique()) == 3
    close = {"atol": 1e-5 * float(expected.abs().max()), "rtol": 1e-5}
    torch.testing.assert_close(converted(images), expected, **close)
    for mode in ("dense", "sparse"):
        set_training_mode(converted.train(), mode)  # type: ignore[arg-type]
        with deterministic_routing():
            torch.testing.assert_close(converted(images), expected, **close)
    image = images[:1]
    choices = [routing.choice.flatten() for routing in converted.eval().forward_routed(image)[1]]
    set_fixed_queries(converted, [tuple(choice.bincount(minlength=3).tolist()) for choice in choices])
    torch.testing.assert_close(converted(image), expected[:1], **close)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_the_budget_reaches_every_parameter(case: str, mode: str) -> None:
    converted = from_timm(_build(case), training_mode=mode).train()
    logits, routings = converted.forward_routed(_images())
    penalty = BudgetLoss(0.5)(converted, routings)
    (logits.square().sum() + penalty).backward()
    assert [name for name, p in converted.named_parameters() if p.grad is None] == []
    assert all(block.router.gate.weight.grad.abs().sum() > 0 for block in routed_blocks(converted))


@pytest.mark.parametrize("case", ["dinov3", "rope_mixed", "eva02_large"])
def test_blocks_that_do_not_route_and_checkpointing(case: str) -> None:
    model = _build(case)
    converted = from_timm(model, layers=[1])
    images = _images()
    with torch.no_grad():
        torch.testing.assert_close(converted(images), model(images), atol=1e-5, rtol=1e-5)
    grads = []
    for enable in (False, True):
        converted.train().zero_grad()
        converted.set_grad_checkpointing(enable)
        with deterministic_routing():
            converted(images).square().sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in converted.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("case", ["dinov3", "eva02", "perception", "rope_mixed"])
def test_images_of_other_sizes(case: str) -> None:
    model = _build(case, dynamic_img_size=True)
    converted = from_timm(model)
    side = model.patch_embed.patch_size[0]
    for height, width in [(6 * side, 9 * side), (3 * side, 5 * side)]:
        images = _images(2, height, width)
        with torch.no_grad():
            torch.testing.assert_close(converted(images), model(images), atol=1e-5, rtol=1e-5)
            scatter = scatter_routing(copy.deepcopy(converted))
            assert scatter(images).isfinite().all()
    for each in (model, converted):
        each.set_input_size((9 * side, 6 * side))
    images = _images(2, 9 * side, 6 * side)
    with torch.no_grad():
        torch.testing.assert_close(converted(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["dinov3", "eva02", "perception", "rope"])
@pytest.mark.parametrize("fixed", [False, True])
def test_export(case: str, fixed: bool) -> None:
    converted: Any = scatter_routing(from_timm(_build(case)))
    images = _images(3)
    if fixed:
        set_fixed_queries(converted, 0.7)
    with torch.no_grad():
        program = torch.export.export(
            converted, (images,), dynamic_shapes={"x": {0: torch.export.Dim("b", min=2, max=8)}}
        )
        torch.testing.assert_close(program.module()(images[:2]), converted(images[:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["dinov3", "rope_mixed"])
def test_timms_graph_extractor(case: str) -> None:
    converted: Any = scatter_routing(from_timm(_build(case)))
    images = _images()
    with torch.no_grad():
        maps = create_feature_extractor(converted, ["blocks.0", "blocks.1"])(images)
        expected = converted.forward_intermediates(images, intermediates_only=True, output_fmt="NLC")
        for tokens, spatial in zip(maps.values(), expected, strict=True):
            torch.testing.assert_close(tokens[:, converted.num_prefix_tokens :], spatial)


@pytest.mark.parametrize("case", ["dinov3", "rope_mixed"])
def test_budget_trace_and_copies(case: str, tmp_path: Path) -> None:
    converted: Any = scatter_routing(from_timm(_build(case)))
    images = _images(4)
    set_budget(converted, 0.7, [images])
    ratio = trace(converted, images).macs.mean() / trace(converted, images).static_macs
    assert abs(ratio - 0.7) < 0.05
    for clone in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(clone(images), converted(images))
    torch.save(converted.state_dict(), tmp_path / "weights.pth")
    again = from_timm(_build(case))
    load_checkpoint(again, tmp_path / "weights.pth")
    assert torch.equal(again(images), converted(images))


@pytest.mark.parametrize("case", ["dinov3", "eva02_large", "perception", "rope", "rope_mixed"])
def test_saved_and_loaded_by_timm(case: str, tmp_path: Path) -> None:
    converted: Any = scatter_routing(from_timm(_build(case), splits=(2, 1), layers=[1]))
    images = _images()
    for name, fixed in (("dynamic", False), ("fixed", True)):
        if fixed:
            set_fixed_queries(converted, 0.9)
        save_pretrained(converted, tmp_path / name)
        again = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        assert type(again) is DGEEva
        assert torch.equal(again(images), converted(images))


def test_macs_are_those_of_the_layers() -> None:
    for case in {"dinov3", "grouped_keys", "eva02", "rope"} & set(MODELS):
        model, images = _build(case), _images(1)
        width, heads = 64, model.blocks[0].attn.num_heads
        tokens = model.num_prefix_tokens + model.patch_embed.num_patches
        attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
        linears = [m for m in attn.modules() if isinstance(m, nn.Linear)]
        expected = tokens * sum(m.weight.numel() for m in linears) + 2 * tokens * width
        expected += tokens * tokens * (2 * width + 3 * heads)
        inside = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
        expected += tokens * (sum(m.weight.numel() for m in inside) + inside[0].out_features)
        count = count_macs(model, images)
        assert count.static_layers.tolist() == [expected, expected]
        routed = count_macs(from_timm(model), images)
        assert (routed.static_layers > count.static_layers).all()
        assert torch.equal(routed.total, torch.full_like(routed.total, routed.static_total))


@pytest.mark.parametrize("heads", [None, 3])
def test_a_pooled_query_has_the_mean_of_its_tokens_rotations(heads: int | None) -> None:
    grid, splits, width = (6, 9), (4, 2, 1), 8
    angles = torch.randn(*(() if heads is None else (heads,)), grid[0] * grid[1], width // 2).repeat_interleave(2, -1)
    rope = torch.cat([angles.sin(), angles.cos()], -1)
    places = rotations(rope, rope.unsqueeze(-2) if heads is None else rope.transpose(0, 1), grid, 2, splits)
    choice = torch.randint(0, 3, (1, 2, 3))
    plan = plan_queries(choice, splits, grid=grid, num_prefix_tokens=2)
    turned = places.of_patches(plan.patches[:, 1:])
    q = torch.randn(1, heads or 1, 1, width).expand(-1, -1, grid[0] * grid[1], -1)
    each = torch.cat([q[:, :, :2], apply_rot_embed_cat(q, rope)], 2).transpose(1, 2).flatten(2)
    expected = pool_queries(each, plan)
    got = apply_rot_embed_cat(q[:, :, 0].expand(len(turned), -1, -1), turned).flatten(1)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("case", "kwargs", "reason"),
    [
        ("rope", {"patch_drop_rate": 0.1}, "patch dropout"),
        ("rope", {"attn_drop_rate": 0.1}, r"blocks\.0\.attn: attention dropout is 0\.1"),
        ("eva", {"use_post_norm": True}, r"blocks\.0 is a EvaBlockPostNorm; .* norms follow attention and MLP"),
    ],
)
def test_what_cannot_be_routed_is_refused(case: str, kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_timm(_build(case, **kwargs))


def test_autocast_and_half_precision() -> None:
    for case in ("dinov3", "eva02"):
        model, images = _build(case), _images()
        converted = from_timm(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(converted(images), model(images), atol=0.1, rtol=0.1)
        half = converted.bfloat16()(images.bfloat16())
        assert half.dtype == torch.bfloat16
        assert half.isfinite().all()
