"""A model made without memory, given uninitialised memory, and initialised is a new model."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from small_models import NAMES, SMALL, small_config
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import Tensor, nn

from dge_models import from_timm, set_fixed_queries
from dge_models.routed import routed_blocks

CONVERTED = {
    "deit3_small_patch16_224": {},  # layer scale
    "vit_small_patch14_reg4_dinov2": {"qk_norm": True},  # registers
    "vit_base_patch16_siglip_224": {},  # pools by attention, no class token
    "vit_giant_patch14_dinov2": {},  # gated MLPs
    "deit_tiny_distilled_patch16_224": {"weight_init": "jax"},
}


def _build(name: str) -> Any:
    if name not in CONVERTED:
        return timm.create_model(name, **small_config(name))
    model = from_timm(timm.create_model(name, **{**SMALL, **CONVERTED[name]}), layers=[0, 2])
    for block in routed_blocks(model):  # which a conversion starts with zero weights
        block.router.reset_parameters()
    return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _spoil(model: nn.Module) -> None:
    for value in _tensors(model).values():
        value.fill_(float("nan") if value.is_floating_point() else -1)


@pytest.mark.parametrize("name", [*NAMES, *CONVERTED])
def test_uninitialised_memory_becomes_a_new_model(name: str) -> None:
    expected = _tensors(_build(name))
    with torch.device("meta"):
        model = _build(name)
    model.to_empty(device="cpu")
    _spoil(model)
    model.init_weights()
    tensors = _tensors(model)
    assert tensors.keys() == expected.keys()
    for key, value in tensors.items():
        like, n = expected[key], value.numel()
        assert value.isfinite().all(), key
        std, wanted = value.std(correction=0).item(), like.std(correction=0).item()
        assert abs(std - wanted) <= 6 * wanted * n**-0.5, (key, std, wanted)
        assert abs(value.mean() - like.mean()) <= 8 * wanted * n**-0.5, key
        if wanted == 0:
            assert torch.equal(value, like), key


@pytest.mark.parametrize("name", ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256", "dpvt_dge_s124_tiny_256"])
@pytest.mark.parametrize("call", ["init_weights", "reinit_non_persistent_buffers"])
def test_computed_buffers_come_back(name: str, call: str) -> None:
    model = _build(name).eval()
    set_fixed_queries(model, 0.7)
    for block in routed_blocks(model):
        block.router.shift_training(0.3)
    before = {key: value.clone() for key, value in model.named_buffers()}
    names = {"shift", "cells", "inside", "earlier", "picks", "rows_of", "token"}
    assert {key.rsplit(".", 1)[1] for key in before} == names
    _spoil(model)
    model.init_weights() if call == "init_weights" else reinit_non_persistent_buffers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())


@pytest.mark.parametrize("name", ["pvt_tiny_256", "pvt_dge_s124_tiny_256", "dpvt_dge_s124_tiny_256"])
def test_parts_that_initialise_themselves_may_keep_what_they_have(name: str) -> None:
    model = _build(name)
    before = {key: value.clone() for key, value in model.named_parameters()}
    model.init_weights(needs_reset=False)
    for key, value in model.named_parameters():
        part = model.get_submodule(key.rpartition(".")[0])
        if isinstance(part, nn.Conv2d):
            assert torch.equal(value, before[key])
        elif isinstance(part, nn.Linear) and key.endswith("weight"):
            assert not torch.equal(value, before[key])
