from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from dpvt_written_out import dpvt
from golden import Golden, reference_weights
from small_models import SMALL_PYRAMID, Build, build_small
from torch.utils.flop_counter import FlopCounterMode

from dge_models import (
    DeformablePyramidVisionTransformer,
    DGEDeformablePyramidVisionTransformer,
    count_macs,
    load_checkpoint,
    save_pretrained,
    trace,
)
from dge_models.macs import model_macs
from dge_models.reference_keys import to_timm_keys
from dge_models.routed import routed_blocks

DEPTHS = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}
PUBLISHED = {  # parameters, tensors, MACs at 256 and 224 pixels with the final norm's
    "tiny": (10_077_032, 152, 2.2573e9, 1.7284e9),
    "small": (17_615_796, 280, 4.4371e9, 3.3973e9),
    "medium": (30_177_156, 472, 7.6676e9, 5.8706e9),
    "large": (40_797_888, 680, 11.3268e9, 8.6722e9),
}
NAME, DGE = "dpvt_small_256", "dpvt_dge_s124_tiny_256"


@pytest.fixture(scope="module")
def loaded(golden_dpvt: Golden, tmp_path_factory: pytest.TempPathFactory) -> DeformablePyramidVisionTransformer:
    model = timm.create_model(NAME).eval()
    load_checkpoint(model, golden_dpvt.save(tmp_path_factory.mktemp("golden") / "reference.pth"))
    return model


@pytest.mark.parametrize("grad", [False, True])
def test_recorded_logits(golden_dpvt: Golden, loaded: DeformablePyramidVisionTransformer, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        logits = loaded(golden_dpvt.images)
    torch.testing.assert_close(logits.detach(), golden_dpvt.tensor("logits"), atol=5e-5, rtol=0)


def test_the_description_written_out_gives_the_recorded_logits(golden_dpvt: Golden) -> None:
    logits = dpvt(golden_dpvt.weights, golden_dpvt.images[:1])
    torch.testing.assert_close(logits, golden_dpvt.tensor("logits")[:1], atol=5e-5, rtol=0)


@pytest.mark.parametrize("size", [(128, 192), (115, 150), (32, 32), (32, 128)])
def test_other_sizes(golden_dpvt: Golden, loaded: DeformablePyramidVisionTransformer, size: tuple[int, int]) -> None:
    """32 × 128 pixels of stage 2 have as many tokens as 64 × 64; its embedding is resized all the same."""
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), dpvt(golden_dpvt.weights, images), atol=5e-5, rtol=0)


@pytest.mark.parametrize("size", DEPTHS)
@pytest.mark.parametrize("kind", ["", "dge_s124_"])
def test_names_build_what_they_say(size: str, kind: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"dpvt_{kind}{size}_256")
    assert type(model) is (DGEDeformablePyramidVisionTransformer if kind else DeformablePyramidVisionTransformer)
    assert tuple(len(stage.blocks) for stage in model.stages) == DEPTHS[size]
    assert model.embed_dims == (64, 128, 320, 512)
    assert [stage.blocks[0].attn.num_heads for stage in model.stages] == [1, 2, 5, 8]
    assert [stage.grid_size for stage in model.stages] == [(64, 64), (32, 32), (16, 16), (8, 8)]
    blocks = routed_blocks(model)
    assert len(blocks) == (sum(DEPTHS[size]) if kind else 0)
    assert {(b.router.splits, b.training_mode, b.drop_path_mode) for b in blocks} <= {((4, 2, 1), "dense", "query")}
    eps = {part.eps for part in model.modules() if isinstance(part, torch.nn.LayerNorm)}
    assert eps == {1e-5, 1e-6}
    assert {stage.patch_embed.norm.eps for stage in model.stages} == {1e-5}
    if not kind:
        parameters, tensors, at_256, at_224 = PUBLISHED[size]
        assert (sum(value.numel() for value in model.parameters()), len(model.state_dict())) == (parameters, tensors)
        for side, expected in ((64, at_256), (56, at_224)):
            final_norm = (side // 8) ** 2 * 512
            assert model_macs(model, (side, side)).static + final_norm == pytest.approx(expected, rel=2e-5)


def test_every_key_of_the_reference_finds_its_place() -> None:
    weights, model = reference_weights(NAME, 5), timm.create_model(NAME)
    model.load_state_dict(weights)
    own, translated = model.state_dict(), to_timm_keys(weights)
    assert translated.keys() == own.keys()
    assert all(torch.equal(value, own[key]) for key, value in translated.items())
    assert torch.equal(own["stages.2.blocks.1.attn.offsets.weight"], weights["block3.1.attn.offsets.weight"])
    wrapped = to_timm_keys({f"module.{key}": value for key, value in weights.items()})
    assert wrapped.keys() == {f"module.{key}" for key in own}


def test_timm_loads_the_authors_files(golden_dpvt: Golden, tmp_path: Path) -> None:
    path, images = golden_dpvt.save(tmp_path / "reference.pth"), golden_dpvt.images[:1, :, :64, :96]
    expected = dpvt(golden_dpvt.weights, images)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    ways: list[dict[str, Any]] = [{"checkpoint_path": path}, overlay, {**overlay, "img_size": (64, 96)}]
    for way in ways:
        with torch.no_grad():
            torch.testing.assert_close(timm.create_model(NAME, **way).eval()(images), expected, atol=5e-5, rtol=0)
    backbone = timm.create_model(NAME, features_only=True, **overlay).eval()
    with torch.no_grad():
        maps = backbone(images)
    assert [tuple(part.shape[1:]) for part in maps] == [(64, 16, 24), (128, 8, 12), (320, 4, 6), (512, 2, 3)]


def test_weights_of_other_families_are_refused(small: Build, tmp_path: Path) -> None:
    models = {name: small(name) for name in ("pvt_tiny_256", "dpvt_tiny_256", "deit_dge_s124_tiny_patch16_256")}
    held = {
        "pvt_tiny_256": r"a pyramid \(PVT\)",
        "dpvt_tiny_256": r"a deformable pyramid \(DPVT\)",
        "deit_dge_s124_tiny_patch16_256": "a vision transformer without stages",
    }
    for source, kind in held.items():
        torch.save(models[source].state_dict(), tmp_path / "weights.pth")
        for target, model in models.items():
            if target == source:
                load_checkpoint(model, tmp_path / "weights.pth")
                continue
            with pytest.raises(ValueError, match=f"it holds {kind}.*; expected "):
                load_checkpoint(model, tmp_path / "weights.pth")
            with pytest.raises(ValueError, match=f"it holds {kind}"):
                model.load_state_dict(models[source].state_dict())


def test_formula_written_out() -> None:
    """Stages of 16 × 16, 8 × 8 (two blocks), 4 × 4 and 2 × 2 tokens; 4 points."""
    model, images = build_small(DGE), torch.randn(3, 3, 64, 64)
    count, queries = count_macs(model, images), trace(model, images).queries.double()
    for layer, (n, c, h) in enumerate([(256, 8, 1), (64, 16, 2), (64, 16, 2), (16, 24, 3), (4, 32, 4)]):
        fixed = n * c + n * c**2 + max(n // 16, 1) * 4 * c
        per_query = c + 3 * h * 4 * c + 3 * h * 4 + 5 * 4 * c + c**2 + 2 * 2 * c**2 + 2 * c
        torch.testing.assert_close(count.layers[layer], fixed + queries[layer] * per_query, rtol=1e-12, atol=0)
        assert count.static_layers[layer] == fixed + n * per_query


@pytest.mark.parametrize("name", ["dpvt_tiny_256", DGE])
@pytest.mark.parametrize("size", [(64, 64), (75, 130)])
def test_counts_agree_with_torchs_counter(name: str, size: tuple[int, int]) -> None:
    """On what torch counts: products and convolutions. Here the rest is subtracted by formula."""
    model, images = build_small(name, num_classes=0), torch.randn(1, 3, *size)
    grids = [(size[0] // stride, size[1] // stride) for stride in (4, 8, 8, 16, 32)]
    tokens = [rows * cols for rows, cols in grids]
    queries = trace(model, images).queries[:, 0].tolist() if name == DGE else tokens
    assert (queries != tokens) == (name == DGE)
    uncounted = sum(tokens[index] * width for index, width in ((0, 8), (1, 16), (3, 24), (4, 32)))
    blocks = [block for stage in model.stages for block in stage.blocks]
    for block, (rows, cols), n, q in zip(blocks, grids, tokens, queries, strict=True):
        width, heads = block.norm1.normalized_shape[0], block.attn.num_heads
        uncounted += (n + q) * width + q * (3 * heads * 4 + 5 * 4 * width) + q * block.mlp.fc1.out_features
        uncounted += -(-rows // 4) * -(-cols // 4) * width if name == DGE else 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    total = count_macs(model, images).total[0].item()
    assert (total - uncounted) * 2 == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model, images = build_small(DGE, num_points=3, offset_gradient=1.0), torch.randn(2, 3, 64, 64)
    model.set_input_size((64, 96))
    save_pretrained(model, tmp_path / "saved")
    back = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert back.img_size == (64, 96)
    assert back.stages[0].blocks[0].attn.offset_gradient == 1.0
    with torch.no_grad():
        assert torch.equal(back(images), model(images))


def test_conversion_names_the_routed_model() -> None:
    from dge_models import from_timm

    with pytest.raises(ValueError, match="created by name, as dpvt_dge_s124_small_256"):
        from_timm(timm.create_model("dpvt_tiny_256", **SMALL_PYRAMID))
