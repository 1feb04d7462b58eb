from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from small_models import scatter_routing

from dge_models import from_timm
from dge_models.dge_vit_entry import checkpoint_filter_fn
from dge_models.routed import routed_blocks
from dge_models.vit import DGEVisionTransformer, DGEVisionTransformerDistilled

TINY: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2}


def test_a_base_is_created_and_converted() -> None:
    model = timm.create_model(
        "dge_vit",
        base="deit_tiny_distilled_patch16_224",
        base_args={**TINY, "num_classes": 4},
        num_classes=7,
        splits=(2, 1),
        layers=[0, -1],
        training_mode="sparse",
        drop_path_mode="query",
        fixed_counts=(1, 3),
    )
    assert type(model) is DGEVisionTransformerDistilled
    assert (model.num_classes, model.patch_embed.img_size) == (7, (64, 64))
    assert [hasattr(block, "router") for block in model.blocks] == [True, False, True]
    for block in routed_blocks(model):
        assert (block.router.splits, block.training_mode, block.drop_path_mode) == ((2, 1), "sparse", "query")
        assert block.fixed_layout is not None
        assert block.fixed_layout.counts == (1, 3)
    assert model.pretrained_cfg["architecture"] == "dge_vit"
    assert model.default_cfg is model.pretrained_cfg


def test_a_tag_chooses_the_bases_configuration() -> None:
    with torch.device("meta"):
        model = timm.create_model("dge_vit", base="vit_base_patch16_224.mae")
    assert type(model) is DGEVisionTransformer
    assert model.pretrained_cfg["tag"] == "mae"
    assert model.num_classes == timm.get_pretrained_cfg("vit_base_patch16_224.mae").num_classes


def test_weights_of_a_file_are_the_converted_models(tmp_path: Path) -> None:
    plain = timm.create_model("deit_tiny_patch16_224", **TINY)
    model, images = scatter_routing(from_timm(plain)).eval(), torch.randn(1, 3, 64, 64)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    arguments: dict[str, Any] = {"base": "deit_tiny_patch16_224", **TINY}
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors")}}
    checkpoint = {"checkpoint_path": str(tmp_path / "w.safetensors")}
    for way in (source, checkpoint):
        loaded = timm.create_model("dge_vit", **arguments, **way).eval()
        assert torch.equal(loaded(images), model(images))
    larger = timm.create_model("dge_vit", **{**arguments, "img_size": 128}, **source)
    assert larger.pos_embed.shape == (1, 65, 32)


def test_pretrained_alone_is_the_bases_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = timm.create_model("deit_tiny_patch16_224")
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf",
        lambda *_, **__: torch.load(tmp_path / "w.pth"),
    )
    model = timm.create_model("dge_vit", base="deit_tiny_patch16_224", pretrained=True)
    weights = plain.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items() if "router" not in key)
    assert not any(block.router.gate.weight.any() for block in routed_blocks(model))


def test_features_only() -> None:
    model = timm.create_model("dge_vit", base="deit_tiny_patch16_224", **TINY, features_only=True, out_indices=(1, 2))
    assert [tuple(part.shape) for part in model(torch.randn(1, 3, 64, 64))] == [(1, 32, 4, 4)] * 2


def test_other_weights_are_refused() -> None:
    model = timm.create_model("dge_vit", base="deit_tiny_patch16_224", **TINY)
    pyramid = timm.create_model("pvt_tiny_256", depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="state_dict: doesn't fit"):
        checkpoint_filter_fn(pyramid.state_dict(), model)


@pytest.mark.parametrize("base", [None, "no_such_model", "hf-hub:me/model", "dge_vit", 3])
def test_a_base_that_is_no_name_is_refused(base: Any) -> None:
    with pytest.raises(ValueError, match=r"base: got .*; expected the registered name of a plain model"):
        timm.create_model("dge_vit", base=base)


def test_a_base_that_cannot_be_converted_is_refused() -> None:
    with pytest.raises(ValueError, match="got ResNet; expected timm's VisionTransformer"):
        timm.create_model("dge_vit", base="resnet18")
