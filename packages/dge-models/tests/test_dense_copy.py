"""The dense model behind a cheaper one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_models import build_plain, partly_plain_images
from small_models import Build

from dge_models import dense_copy, from_timm, merge_tokens
from dge_models.routed import routed_blocks


@pytest.mark.parametrize("case", ["token", "distilled", "registers", "qk_norm"])
@pytest.mark.parametrize("way", ["route", "merge"])
def test_what_the_plain_model_computes(case: str, way: str) -> None:
    plain, images = build_plain(case), partly_plain_images(case, 2)
    cheaper: Any = from_timm(plain) if way == "route" else merge_tokens(plain, 0.7, adaptive=False)
    for block in routed_blocks(cheaper):
        with torch.no_grad():
            block.router.gate.weight.normal_(0, 4)
    dense = dense_copy(cheaper)
    with torch.no_grad():
        expected = plain(images)
        assert (cheaper(images) - expected).abs().max() > 1e-4
        torch.testing.assert_close(dense(images), expected)
    assert dense.state_dict().keys() == plain.state_dict().keys()
    assert not dense.training


@pytest.mark.parametrize("name", ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256"])
def test_of_registered_models(name: str, small: Build) -> None:
    model = small(name)
    finest = copy.deepcopy(model)
    for block in routed_blocks(finest):
        with torch.no_grad():
            block.router.gate.weight.zero_()
            block.router.gate.bias.copy_(torch.tensor([1.0, 0, 0]))
    size = 64 if name.startswith("pvt") else 32
    images = torch.randn(2, 3, size, size)
    dense = dense_copy(model)
    with torch.no_grad():
        torch.testing.assert_close(dense(images), finest(images))
    assert routed_blocks(model)
    assert not routed_blocks(dense)
    assert not [key for key in dense.state_dict() if "router" in key]


def test_a_plain_model_is_copied() -> None:
    plain = build_plain()
    dense = dense_copy(plain)
    assert dense is not plain
    assert type(dense) is type(plain)
