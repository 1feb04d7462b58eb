"""torchao's int8 weights and activations, gates included, err as they do on the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from companion import companion
from layer_pairs import KINDS, assert_same_fixed, images, pair
from small_models import build_small
from torch import nn

from dge_models import count_macs, from_timm
from dge_models.routed import routed_blocks

companion("torchao")
quantization = companion("torchao.quantization")

every_kind = pytest.mark.parametrize("kind", KINDS)
every_config = pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])


def _quantised(model: Any, config: str) -> Any:
    quantization.quantize_(model, getattr(quantization, config)())
    return model


@every_kind
@every_config
def test_quantised_models_err_as_the_plain_one(kind: str, config: str) -> None:
    plain, routed = pair(kind)
    pixels = images(kind)
    exact = plain(pixels).detach()
    with torch.no_grad():
        expected = _quantised(plain, config)(pixels)
        error = (expected - exact).abs().max().item()
        assert error > 1e-4
        candidates = [_quantised(routed, config)] + ([from_timm(plain)] if kind == "deit" else [])
        # What is 1e-7 apart may be rounded to another of 255 steps, which is an error of the same kind.
        atol = 1e-5 if config == "Int8WeightOnlyConfig" else error
        for model in candidates:
            torch.testing.assert_close(model(pixels), expected, atol=atol, rtol=0)
            assert_same_fixed(model, expected, pixels, atol=atol)


@every_config
@pytest.mark.parametrize("name", ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256"])
def test_quantised_gates_route_and_are_counted(name: str, config: str) -> None:
    model, pixels = build_small(name), images(name[:3])
    macs, before = count_macs(model, pixels), model.forward_routed(pixels)[1]
    quantised = _quantised(model, config)
    assert all(type(block.router.gate.weight) is not nn.Parameter for block in routed_blocks(quantised))
    with torch.no_grad():
        after = quantised.forward_routed(pixels)[1]
    # The first router sees the same tokens; few of its regions are as close to a tie as quantisation moves them.
    same = (before[0].choice == after[0].choice).float().mean()
    assert same > 0.8
    assert count_macs(quantised, pixels).static_total == macs.static_total
