from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import Golden, reference_weights
from small_models import Build

from dge_models import DGEPyramidVisionTransformer, PyramidVisionTransformer, set_training_mode
from dge_models.reference_keys import to_timm_keys
from dge_models.routed import routed_blocks

DEPTHS = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}
NAMES = [f"pvt_{kind}{size}_256" for kind in ("", "dge_s124_") for size in DEPTHS]
RECORDED = {  # of the reference, split sets left out
    "pvt_dge_s124_tiny_256": 13_354_496,
    "pvt_small_256": 24_604_904,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_build_what_they_say(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    size = next(size for size in DEPTHS if f"_{size}_" in name)
    assert type(model) is (DGEPyramidVisionTransformer if "dge" in name else PyramidVisionTransformer)
    assert tuple(len(stage.blocks) for stage in model.stages) == DEPTHS[size]
    assert model.embed_dims == (64, 128, 320, 512)
    assert [stage.blocks[0].attn.num_heads for stage in model.stages] == [1, 2, 5, 8]
    assert [stage.blocks[0].mlp.fc1.out_features // stage.blocks[0].attn.dim for stage in model.stages] == [8, 8, 4, 4]
    reductions = [stage.blocks[0].attn.sr for stage in model.stages]
    assert [1 if part is None else part.stride[0] for part in reductions] == [8, 4, 2, 1]
    assert [stage.grid_size for stage in model.stages] == [(64, 64), (32, 32), (16, 16), (8, 8)]
    assert [stage.num_prefix_tokens for stage in model.stages] == [0, 0, 0, 1]
    blocks = routed_blocks(model)
    assert len(blocks) == (sum(DEPTHS[size]) if "dge" in name else 0)
    assert {(b.router.splits, b.training_mode, b.drop_path_mode) for b in blocks} <= {((4, 2, 1), "dense", "query")}
    if name in RECORDED:
        assert sum(value.numel() for value in model.parameters()) == RECORDED[name]
    eps = {part.eps for stage in model.stages for part in stage.modules() if isinstance(part, torch.nn.LayerNorm)}
    assert eps == {1e-5, 1e-6}
    assert {stage.patch_embed.norm.eps for stage in model.stages} == {1e-5}
    assert {part.norm.eps for stage in model.stages[:3] for part in [stage.blocks[0].attn]} == {1e-5}
    assert (model.stages[0].blocks[0].norm1.eps, model.stages[3].blocks[0].norm2.eps, model.norm.eps) == (1e-6,) * 3


@pytest.mark.parametrize("name", ["pvt_dge_s124_tiny_256", "pvt_dge_s124_small_256", "pvt_small_256"])
def test_every_key_of_the_reference_finds_its_place(name: str) -> None:
    weights = reference_weights(name, 5)
    model = timm.create_model(name)
    model.load_state_dict(weights)
    own = model.state_dict()
    translated = to_timm_keys(weights)
    assert translated.keys() == own.keys()
    assert all(torch.equal(value, own[key]) for key, value in translated.items())
    assert torch.equal(own["stages.2.blocks.1.attn.kv.weight"], weights["block3.1.attn.kv.weight"])
    assert torch.equal(own["stages.3.cls_token"], weights["cls_token"])


def test_timm_loads_the_authors_files(golden_pvt: Golden, tmp_path: Path) -> None:
    path = golden_pvt.save(tmp_path / "reference.pth")
    ways: list[dict[str, Any]] = [
        {"checkpoint_path": path},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}},
    ]
    for way in ways:
        model = timm.create_model(golden_pvt.model, **way).eval()
        with torch.no_grad():
            logits = model(golden_pvt.images[:1])
        torch.testing.assert_close(logits, golden_pvt.tensor("logits")[:1], atol=5e-5, rtol=0)


def test_timm_adapts_the_authors_files_to_another_size_head_and_input(golden_pvt: Golden, tmp_path: Path) -> None:
    overlay = {"file": str(golden_pvt.save(tmp_path / "reference.pth"))}
    made = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    fixed = timm.create_model(golden_pvt.model, img_size=224, num_classes=5, in_chans=1, **made).eval()
    assert [stage.grid_size[0] for stage in fixed.stages] == [56, 28, 14, 7]
    assert fixed.stages[3].pos_embed.shape == (1, 50, 512)
    free = timm.create_model(golden_pvt.model, **made).eval()
    images = torch.randn(1, 3, 224, 224)
    fixed = timm.create_model(golden_pvt.model, img_size=224, **made).eval()
    with torch.no_grad():
        torch.testing.assert_close(fixed(images), free(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("class_token", [True, False])
def test_a_backbone_takes_the_authors_files(golden_pvt: Golden, tmp_path: Path, class_token: bool) -> None:
    overlay = {"file": str(golden_pvt.save(tmp_path / "reference.pth"))}
    pool = {} if class_token else {"class_token": False, "global_pool": "avg"}
    backbone = timm.create_model(
        golden_pvt.model, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **pool
    ).eval()
    whole = timm.create_model(golden_pvt.model).eval()
    whole.load_state_dict(golden_pvt.weights)
    with torch.no_grad():
        maps = backbone(golden_pvt.images[:1])
        expected = whole.forward_intermediates(golden_pvt.images[:1], intermediates_only=True)
    assert [part.shape[1:] for part in maps] == [(64, 64, 64), (128, 32, 32), (320, 16, 16), (512, 8, 8)]
    for index in range(4 if class_token else 3):
        torch.testing.assert_close(maps[index], expected[index])


def test_other_splits_and_other_families_are_refused(golden_pvt: Golden, golden_dge: Golden, tmp_path: Path) -> None:
    pvt, deit = golden_pvt.save(tmp_path / "pvt.pth"), golden_dge.save(tmp_path / "deit.pth")
    splits = r"stages\.0\.blocks\.0: the checkpoint's splits are \(4, 2, 1\); expected the model's, \(2, 1\)"
    to_deit = "holds a pyramid \\(PVT\\); expected weights of a DGEVisionTransformer"
    to_pvt = "holds a vision transformer without stages \\(DeiT\\); expected a pyramid's"
    cases: list[tuple[str, Path, dict[str, Any], str]] = [
        (golden_pvt.model, pvt, {"splits": (2, 1)}, splits),
        (golden_dge.model, pvt, {"depth": 2}, to_deit),
        (golden_pvt.model, deit, {}, to_pvt),
        ("pvt_tiny_256", deit, {}, to_pvt),
    ]
    for name, path, kwargs, reason in cases:
        ways = ({"checkpoint_path": path}, {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}})
        for way in ways:
            with pytest.raises((ValueError, RuntimeError), match=reason):
                timm.create_model(name, **way, **kwargs)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_a_training_step_at_224_reaches_every_parameter(mode: str) -> None:
    """Stages of 56, 28, 14 and 7 tokens a side: most are no multiples of 4."""
    model = timm.create_model("pvt_dge_s124_tiny_256", depths=(1, 1, 1, 1), num_classes=10, drop_path_rate=0.1).train()
    set_training_mode(model, mode)  # type: ignore[arg-type]
    model(torch.randn(1, 3, 224, 224)).square().sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_pretrained_needs_a_file(small: Build) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("pvt_tiny_256", pretrained=True)
    assert small("pvt_tiny_256").training is False
