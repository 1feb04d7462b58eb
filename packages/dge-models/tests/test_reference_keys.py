from __future__ import annotations

import pytest
import timm
import torch
from golden import Golden, reference_weights

from dge_models.reference_keys import split_mismatch, to_timm_keys


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
