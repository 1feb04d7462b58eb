from __future__ import annotations

import pytest
import timm
import torch
from golden import Golden, reference_weights

from dge_models.reference_keys import refuse_misfit, split_mismatch, to_timm_keys


def test_queries_keys_and_values_are_fused_in_this_order(golden_dge: Golden) -> None:
    weights = golden_dge.weights
    fused = to_timm_keys(weights)["blocks.3.attn.qkv.weight"]
    query, keys, values = fused.split(192)
    assert torch.equal(query, weights["blocks.3.attn.q.weight"])
    assert torch.equal(keys, weights["blocks.3.attn.kv.weight"][:192])
    assert torch.equal(values, weights["blocks.3.attn.kv.weight"][192:])


def test_wrapped_names_are_translated_in_place(golden_dge: Golden) -> None:
    wrapped = {f"module.{key}": value for key, value in golden_dge.weights.items()}
    plain = to_timm_keys(golden_dge.weights)
    assert set(to_timm_keys(wrapped)) == {f"module.{key}" for key in plain}


def test_timms_names_stay() -> None:
    weights = {"blocks.0.attn.qkv.weight": torch.zeros(6, 2), "blocks.0.router.gate.bias": torch.zeros(3)}
    assert to_timm_keys(weights) == weights


@pytest.mark.parametrize("half", ["q", "kv"])
def test_half_of_a_pair_stays_to_be_reported(half: str) -> None:
    weights = {f"blocks.0.attn.{half}.weight": torch.zeros(2, 2)}
    assert list(to_timm_keys(weights)) == list(weights)


def test_every_distilled_key_finds_its_place() -> None:
    keys = reference_weights("deit_dge_s124_tiny_patch16_256_distilled", 7)
    model = timm.create_model("deit_dge_s124_tiny_distilled_patch16_256")
    assert split_mismatch(keys, model) is None
    translated = to_timm_keys(keys)
    assert {k: v.shape for k, v in translated.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_a_pyramids_stages_are_numbered_as_timms() -> None:
    weights = {
        "block2.1.attn.q.weight": torch.zeros(2, 2),
        "block2.1.attn.kv.weight": torch.zeros(4, 2),
        "block2.1.dge.router.gate.bias": torch.zeros(3),
        "block2.1.dge.splits": torch.tensor([4, 2, 1]),
        "patch_embed1.norm.bias": torch.zeros(2),
        "pos_embed1": torch.zeros(1, 4, 2),
        "pos_embed2": torch.zeros(1, 2, 2),
        "cls_token": torch.zeros(1, 1, 2),
        "norm.bias": torch.zeros(2),
    }
    expected = {
        "stages.1.blocks.1.attn.q.weight",
        "stages.1.blocks.1.attn.kv.weight",
        "stages.1.blocks.1.router.gate.bias",
        "stages.0.patch_embed.norm.bias",
        "stages.0.pos_embed",
        "stages.1.pos_embed",
        "stages.1.cls_token",
        "norm.bias",
    }
    assert set(to_timm_keys(weights)) == expected
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    assert set(to_timm_keys(wrapped)) == {f"module.{key}" for key in expected}
    assert to_timm_keys(to_timm_keys(weights)).keys() == expected


def test_a_pyramids_splits_are_compared(golden_pvt: Golden) -> None:
    model = timm.create_model(golden_pvt.model, splits=(4, 1))
    mismatch = split_mismatch(golden_pvt.weights, model)
    assert mismatch is not None
    assert mismatch.startswith("stages.0.blocks.0: the checkpoint's splits are (4, 2, 1); expected the model's, (4, 1)")
    assert split_mismatch(golden_pvt.weights, timm.create_model(golden_pvt.model)) is None


def test_weights_of_another_family_are_refused(golden_dge: Golden, golden_pvt: Golden) -> None:
    deit, pvt = timm.create_model("deit_tiny_patch16_256"), timm.create_model("pvt_tiny_256")
    for weights in (golden_pvt.weights, {f"module.{key}": value for key, value in golden_pvt.weights.items()}):
        with pytest.raises(ValueError, match=r"here: it holds a pyramid \(PVT\); expected weights of a VisionTransf"):
            refuse_misfit(weights, deit, "here")
        refuse_misfit(weights, pvt, "here")
    with pytest.raises(ValueError, match="here: it holds a vision transformer without stages"):
        refuse_misfit(golden_dge.weights, pvt, "here")
    refuse_misfit(golden_dge.weights, deit, "here")
