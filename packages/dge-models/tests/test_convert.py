from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from plain_models import stirred
from timm.layers import GluMlp, LayerScale, SwiGLU
from timm.layers.activations import QuickGELU
from torch import nn

from dge_models import from_timm
from dge_models.encoder import DGEBlock
from dge_models.vit import DGEVisionTransformer, DGEVisionTransformerDistilled, routed_blocks

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", {"img_size": 64, **TINY}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64, **TINY}),
    "deit3": ("deit3_small_patch16_224", {"img_size": 112, **TINY}),
    "augreg": ("vit_tiny_patch16_224", {"img_size": 64, **TINY}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 70, **TINY}),
    "clip": ("vit_base_patch32_clip_224", {"img_size": 96, **TINY}),
    "clip_quickgelu": ("vit_base_patch32_clip_quickgelu_224", {"img_size": 96, **TINY}),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 64, **TINY}),
    "average": ("vit_base_patch16_siglip_gap_224", {"img_size": 64, **TINY}),
    "qk_norm": ("vit_tiny_patch16_224", {"img_size": 64, "qk_norm": True, **TINY}),
    "swiglu_packed": ("vit_giant_patch14_reg4_dinov2", {"img_size": 56, **TINY}),
    "swiglu": ("vit_tiny_patch16_224", {"img_size": 64, "mlp_layer": SwiGLU, **TINY}),
    "dynamic": ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True, **TINY}),
}
# What makes the case worth having: without it the conversion of something else would be tested.
PARTS: dict[str, Callable[[Any], bool]] = {
    "deit3": lambda model: isinstance(model.blocks[0].ls1, LayerScale) and model.no_embed_class,
    "registers": lambda model: model.num_prefix_tokens == 5 and isinstance(model.blocks[0].ls1, LayerScale),
    "clip": lambda model: isinstance(model.norm_pre, nn.LayerNorm),
    "clip_quickgelu": lambda model: isinstance(model.blocks[0].mlp.act, QuickGELU),
    "siglip": lambda model: model.num_prefix_tokens == 0 and model.attn_pool is not None,
    "average": lambda model: model.num_prefix_tokens == 0 and model.attn_pool is None,
    "qk_norm": lambda model: isinstance(model.blocks[0].attn.q_norm, nn.LayerNorm),
    "swiglu_packed": lambda model: isinstance(model.blocks[0].mlp, GluMlp),
    "swiglu": lambda model: isinstance(model.blocks[0].mlp, SwiGLU),
}


def _scaled(name: str, kwargs: dict[str, Any]) -> torch.nn.Module:
    model: torch.nn.Module = stirred(timm.create_model(name, **kwargs))
    return model


@pytest.mark.parametrize("case", MODELS)
def test_converted_models_compute_the_same(case: str) -> None:
    name, kwargs = MODELS[case]
    model = _scaled(name, kwargs)
    assert PARTS.get(case, lambda model: True)(model)
    converted = from_timm(model)
    images = torch.randn(2, 3, kwargs["img_size"], kwargs["img_size"])
    expected = model(images)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            out = converted(images)
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    features, maps = converted.forward_intermediates(images)
    expected_features, expected_maps = model.forward_intermediates(images)
    torch.testing.assert_close(features, expected_features, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(maps, expected_maps, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("case", MODELS)
def test_keys_are_timms_and_the_routers(case: str) -> None:
    name, kwargs = MODELS[case]
    model, fresh = _scaled(name, kwargs), timm.create_model(name, **kwargs)
    converted = from_timm(model)
    routers = {f"blocks.{i}.router.gate.{part}" for i in range(3) for part in ("weight", "bias")}
    weights = converted.state_dict()
    assert weights.keys() - model.state_dict().keys() == routers
    fresh.load_state_dict({key: value for key, value in weights.items() if key not in routers})
    missing, unexpected = from_timm(fresh).load_state_dict(model.state_dict(), strict=False)
    assert (set(missing), unexpected) == (routers, [])


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_converted_models_train(case: str, mode: str) -> None:
    name, kwargs = MODELS[case]
    converted = from_timm(timm.create_model(name, drop_path_rate=0.2, **kwargs), training_mode=mode).train()
    images = torch.randn(2, 3, kwargs["img_size"], kwargs["img_size"])
    logits, routings = converted.forward_routed(images)
    (logits.square().sum() + sum(routing.queries.sum() for routing in routings)).backward()
    assert [name for name, p in converted.named_parameters() if p.grad is None] == []


def test_tokens_of_large_norm_do_not_reach_the_routers() -> None:
    model = _scaled(*MODELS["deit"])
    images = torch.randn(2, 3, 64, 64) * 1e4
    with torch.no_grad():
        out, expected = from_timm(model)(images), model(images)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_original_is_left_alone_and_its_weights_are_copied() -> None:
    model = _scaled(*MODELS["deit"])
    before = copy.deepcopy(model.state_dict())
    converted = from_timm(model, layers=[1])
    assert type(converted) is DGEVisionTransformer
    assert not routed_blocks(model)
    extra = converted.state_dict().keys() - before.keys()
    assert extra == {"blocks.1.router.gate.weight", "blocks.1.router.gate.bias"}
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_options_reach_the_blocks() -> None:
    converted = from_timm(
        _scaled(*MODELS["distilled"]), (2, 1), layers=(0, -1), training_mode="sparse", drop_path_mode="query"
    )
    assert type(converted) is DGEVisionTransformerDistilled
    assert [type(block) is DGEBlock for block in converted.blocks] == [True, False, True]
    for block in routed_blocks(converted):
        assert (block.router.splits, block.training_mode, block.drop_path_mode) == ((2, 1), "sparse", "query")
    assert {block.drop_path_mode for block in routed_blocks(from_timm(_scaled(*MODELS["deit"])))} == {"image"}


def test_mode_device_and_dtype_are_kept() -> None:
    model = _scaled(*MODELS["deit"]).double()
    converted = from_timm(model)
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.float64}
    assert not any(module.training for module in converted.modules())
    assert all(module.training for module in from_timm(model.train()).modules())


def test_copies_and_pickles_of_a_converted_model() -> None:
    converted = from_timm(_scaled(*MODELS["deit"]))
    images = torch.randn(1, 3, 64, 64)
    for clone in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert type(clone) is DGEVisionTransformer
        assert torch.equal(clone(images), converted(images))


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("vit_tiny_patch16_224", {"attn_drop_rate": 0.1}, r"blocks\.0\.attn: attention dropout is 0\.1"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.1}, "patch dropout"),
        ("vit_dlittle_patch16_reg1_gap_256", {}, r"blocks\.0\.attn: got DiffAttention; expected timm's Attention"),
        ("vit_small_patch16_18x2_224", {}, r"blocks\.0 is a ParallelThingsBlock; .* several attentions in parallel"),
        ("vit_base_patch16_xp_224", {}, r"blocks\.0 is a ParallelScalingBlock; .* attention and MLP run in parallel"),
        ("vit_base_patch16_rpn_224", {}, r"blocks\.0 is a ResPostBlock; .* norms follow attention and MLP"),
        ("vit_small_resnet26d_224", {}, "got a hybrid whose patches come from HybridEmbed"),
        ("vit_relpos_small_patch16_224", {}, "got VisionTransformerRelPos; .* bias per pair of tokens"),
        ("beit_base_patch16_224", {}, "got Beit; .* bias per pair of tokens"),
        ("swin_tiny_patch4_window7_224", {}, "got SwinTransformer; .* confined to windows"),
        ("samvit_base_patch16_224", {}, "got VisionTransformerSAM; .* confined to windows"),
        ("naflexvit_base_patch16_gap", {}, "got NaFlexVit; .* different token grids"),
        ("pvt_v2_b0", {}, "got PyramidVisionTransformerV2; .* a pyramid"),
        ("resnet18", {}, "got ResNet; expected timm's VisionTransformer"),
    ],
)
def test_other_models_are_refused_with_the_reason(name: str, kwargs: dict[str, Any], reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    with pytest.raises(ValueError, match=reason):
        from_timm(model)


def test_converting_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="converted already"):
        from_timm(from_timm(_scaled(*MODELS["deit"])))
    with pytest.raises(ValueError, match="converted already"):
        from_timm(timm.create_model("deit_dge_s124_tiny_patch16_256"))


def test_bad_options_are_refused() -> None:
    model = _scaled(*MODELS["deit"])
    with pytest.raises(ValueError, match="splits: got"):
        from_timm(model, splits=(4, 3))
    with pytest.raises(ValueError, match=r"layers: got \[7\]"):
        from_timm(model, layers=[7])
    with pytest.raises(ValueError, match="training_mode: got 'soft'"):
        from_timm(model, training_mode="soft")  # type: ignore[arg-type]
