from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from golden import Golden, Trap
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer

from dge_models.vit import DGEVisionTransformer, DGEVisionTransformerDistilled, routed_blocks

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
NAMES = [
    f"{family.format(size)}_patch16_256"
    for size in SIZES
    for family in ("deit_{}", "deit_dge_s124_{}", "deit_dge_s124_{}_distilled")
]


@pytest.mark.parametrize("name", NAMES)
def test_names_build_what_they_say(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    width, heads = next(value for size, value in SIZES.items() if f"_{size}_" in name)
    expected = VisionTransformer
    if "dge" in name:
        expected = DGEVisionTransformerDistilled if "distilled" in name else DGEVisionTransformer
    assert type(model) is expected
    assert (model.embed_dim, model.blocks[0].attn.num_heads, len(model.blocks)) == (width, heads, 12)
    assert model.patch_embed.grid_size == (16, 16)
    blocks = routed_blocks(model)
    assert len(blocks) == (12 if "dge" in name else 0)
    assert {(b.router.splits, b.training_mode, b.drop_path_mode) for b in blocks} <= {((4, 2, 1), "dense", "query")}


@pytest.mark.parametrize("name", NAMES)
def test_default_configuration(name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    assert config.input_size == (3, 256, 256)
    data = resolve_data_config(pretrained_cfg=config.to_dict())
    assert int(256 / data["crop_pct"]) == 292
    assert data["interpolation"] == "bicubic"
    with torch.device("meta"):
        parameters = dict(timm.create_model(name).named_parameters())
    classifiers = config.classifier if isinstance(config.classifier, tuple) else (config.classifier,)
    assert all(f"{part}.weight" in parameters for part in (*classifiers, config.first_conv))


def test_parameter_counts_are_the_references(golden_dge: Golden, golden_dense: Golden) -> None:
    for golden in (golden_dge, golden_dense):
        with torch.device("meta"):
            model = timm.create_model(golden.model)
        assert sum(p.numel() for p in model.parameters()) == golden.meta["trainable_parameters"]


@pytest.mark.parametrize("case", ["golden_dge", "golden_dense"])
def test_timm_loads_the_authors_files(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    golden: Golden = request.getfixturevalue(case)
    path = golden.save(tmp_path / "reference.pth")
    overlay = {"file": str(path)}
    ways = [
        timm.create_model(golden.model, checkpoint_path=path),
        timm.create_model(golden.model, pretrained=True, pretrained_cfg_overlay=overlay),
    ]
    for model in ways:
        with torch.no_grad():
            logits = model.eval()(golden.images[:1])
        torch.testing.assert_close(logits, golden.tensor("logits")[:1], atol=5e-5, rtol=0)


def test_timm_adapts_the_authors_files_to_another_size_and_head(golden_dge: Golden, tmp_path: Path) -> None:
    path = golden_dge.save(tmp_path / "reference.pth")
    overlay = {"file": str(path)}
    model = timm.create_model(
        golden_dge.model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, img_size=224
    )
    assert model.eval()(torch.randn(1, 3, 224, 224)).shape == (1, 5)
    stored = golden_dge.weights["pos_embed"]
    assert torch.equal(model.pos_embed[:, 0], stored[:, 0])
    grid = stored[:, 1:].unflatten(1, (16, 16)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, (14, 14), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed[:, 1:].detach(), resized.flatten(2).transpose(1, 2))


def test_timm_refuses_weights_of_other_splits(golden_dge: Golden, tmp_path: Path) -> None:
    path = golden_dge.save(tmp_path / "reference.pth")
    reason = r"blocks\.0: the checkpoint's splits are \(4, 2, 1\); expected the model's, \(2, 1\)"
    with pytest.raises(ValueError, match=reason):
        timm.create_model(
            golden_dge.model,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(path)},
            splits=(2, 1),
        )
    with pytest.raises(RuntimeError, match=reason):
        timm.create_model(golden_dge.model, checkpoint_path=path, splits=(2, 1))


@pytest.mark.parametrize("way", ["checkpoint_path", "overlay"])
def test_timm_never_runs_code_in_a_file(tmp_path: Path, way: str) -> None:
    """The reason for the oldest timm that this package takes."""
    path, created = tmp_path / "trap.pth", tmp_path / "created"
    torch.save({"model": {}, "args": Trap(created)}, path)
    file = {"checkpoint_path": path}
    if way == "overlay":
        file = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    with pytest.raises(RuntimeError, match="blocked loading"):
        timm.create_model("deit_dge_s124_tiny_patch16_256", **file)
    assert not created.exists()


@pytest.mark.parametrize("name", [name for name in NAMES if "tiny" in name])
def test_a_training_step_reaches_every_parameter(name: str) -> None:
    model = timm.create_model(name, num_classes=42, drop_path_rate=0.1).train()
    out = model(torch.randn(2, 3, 256, 256))
    out.mean().backward()
    assert out.shape == (2, 42)
    assert [parameter for parameter, value in model.named_parameters() if value.grad is None] == []
