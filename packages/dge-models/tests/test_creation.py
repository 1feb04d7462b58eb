from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from small_models import SMALL, build_small
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dge_models import from_timm, save_pretrained
from dge_models.creation import architecture_of, check_recreation, creation_arguments

TINY: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2}


def test_only_what_is_not_the_default_is_an_argument() -> None:
    model = from_timm(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=224), (2, 1), drop_path_mode="query")
    assert architecture_of(model) == "dge_vit"
    assert creation_arguments(model) == {
        "base": "vit_tiny_patch16_224",
        "base_args": {"depth": 2},
        "splits": [2, 1],
        "trained_splits": [2, 1],
        "training_mode": "dense",
        "drop_path_mode": "query",
    }
    assert creation_arguments(timm.create_model("vit_tiny_patch16_224")) == {}
    assert creation_arguments(timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.2, proj_drop_rate=0.1)) == {}


def test_arguments_are_read_where_timm_recorded_none() -> None:
    """Versions before 1.0.31 record nothing."""
    plain = timm.create_model(
        "vit_tiny_patch16_224", **TINY, num_classes=5, mlp_ratio=2.0, reg_tokens=1, in_chans=1, global_pool="avg"
    )
    vars(plain).pop("_model_args", None)
    arguments = creation_arguments(from_timm(plain))
    expected = {**TINY, "img_size": [64, 64], "mlp_ratio": 2.0, "reg_tokens": 1, "in_chans": 1, "global_pool": "avg"}
    assert {key: arguments["base_args"].get(key) for key in expected} == expected
    check_recreation(from_timm(plain), arguments)


def _heads(model: Any) -> None:
    model.blocks[1].attn.num_heads = 4


def _norm(model: Any) -> None:
    model.blocks[1].norm2.eps = 1e-3


def _activation(model: Any) -> None:
    model.blocks[0].mlp.act = nn.ReLU()


def _wider(model: Any) -> None:
    model.blocks[1].mlp.fc1 = nn.Linear(32, 64)


def _more(model: Any) -> None:
    model.blocks[0].extra = nn.Linear(2, 2)


def _splits(model: Any) -> None:
    model.blocks[2].router.splits = (8, 4, 2)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (_heads, r"blocks\.1\.attn\.num_heads is 4; expected 2 as in what timm\.create_model\('dge_vit'"),
        (_norm, r"blocks\.1\.norm2\.eps is 0\.001; expected 1e-06"),
        (_activation, r"blocks\.0\.mlp\.act is ReLU; expected GELU"),
        (_wider, r"blocks\.1\.mlp\.fc1\.bias is \(64,\); expected \(128,\)"),
        (_more, r"blocks\.0\.extra\.bias is \(2,\); expected missing"),
        (_splits, r"blocks\.2\.router\.splits is \(8, 4, 2\); expected \(4, 2, 1\)"),
    ],
)
def test_what_was_changed_by_hand_is_refused(tmp_path: Any, change: Any, difference: str) -> None:
    model = from_timm(timm.create_model("vit_tiny_patch16_224", **TINY))
    check_recreation(model, creation_arguments(model))
    change(model)
    with pytest.raises(ValueError, match="was changed in a way that its arguments don't tell: " + difference):
        save_pretrained(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_models_that_timm_knows_no_name_of_are_refused(tmp_path: Any) -> None:
    plain = VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    for model in (plain, from_timm(plain), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="that timm knows no name of; expected one from timm"):
            save_pretrained(model, tmp_path / "saved")


def test_arguments_that_json_cannot_hold_are_refused(tmp_path: Any) -> None:
    model = timm.create_model("deit_tiny_patch16_256", **SMALL, mlp_layer=type(build_small().blocks[0].mlp))
    with pytest.raises(ValueError, match=r"its arguments .*mlp_layer.* can't be stored as JSON"):
        save_pretrained(model, tmp_path / "saved")


def test_looking_leaves_random_numbers_and_the_model_alone() -> None:
    model = build_small()
    state, keys = torch.get_rng_state(), set(vars(model))
    check_recreation(model, creation_arguments(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(model)) == keys
