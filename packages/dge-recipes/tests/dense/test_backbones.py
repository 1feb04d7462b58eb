"""Backbones under detectors and segmenters: their maps, starting weights and frozen stages."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from dense_networks import NARROW, pyramid, vit
from torch import nn

import dge_models
from dge_recipes.config import ModelConfig
from dge_recipes.dense import create_backbone, routed_backbone
from dge_recipes.dense.backbones import build_maps, own_strides
from dge_recipes.errors import UserError


def test_maps_of_a_pyramid_are_timms_features() -> None:
    model = pyramid().eval()
    features: Any = timm.create_model("pvt_dge_s124_tiny_256", features_only=True, out_indices=(1, 3), **NARROW).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    maps: Any = build_maps(model, (8, 16), 32)  # 16 is in between and left out below
    assert maps.channels == [16, 16]
    maps = build_maps(pyramid(), (4, 8, 16, 32), 32).eval()
    images = torch.randn(2, 3, 64, 96)
    for index, expected in zip((1, 3), features(images), strict=True):
        torch.testing.assert_close(maps(images)[index], expected)


def test_a_vision_transformer_gets_a_simple_feature_pyramid() -> None:
    maps: Any = build_maps(vit(), (8, 16, 32), 24).eval()
    assert isinstance(maps, dge_models.SimpleFeaturePyramid)
    shapes = [tuple(each.shape) for each in maps(torch.randn(1, 3, 64, 96)).values()]
    assert shapes == [(1, 24, 8, 12), (1, 24, 4, 6), (1, 24, 2, 3)]


def test_own_strides() -> None:
    assert own_strides(pyramid()) == own_strides(vit()) == (4, 8, 16, 32)


@pytest.mark.parametrize("routed", [False, True])
def test_it_starts_from_a_classifier(tmp_path: Path, routed: bool) -> None:
    name = "pvt_dge_s124_tiny_256" if routed else "pvt_tiny_256"
    classifier = timm.create_model(name, num_classes=7, **{**NARROW, "class_token": True, "global_pool": "token"})
    file = tmp_path / "classifier.pth"
    torch.save(classifier.state_dict(), file)
    model = pyramid(routed, init_from=str(file))
    own, theirs = model.state_dict(), classifier.state_dict()
    same = {key for key in own if own[key].shape == theirs[key].shape and torch.equal(own[key], theirs[key])}
    # The class token has a place among the last stage's positions, which is left out with it.
    assert set(own) - same == {"stages.3.pos_embed"}
    torch.testing.assert_close(own["stages.3.pos_embed"], theirs["stages.3.pos_embed"][:, 1:])
    again = pyramid(routed, init_from=str(file))
    assert all(torch.equal(own[key], value) for key, value in again.state_dict().items())


@pytest.mark.parametrize(("model", "depth"), [(pyramid, 4), (vit, 2)])
def test_frozen_stages_learn_nothing_and_are_not_random(model: Any, depth: int) -> None:
    maps: Any = build_maps(model(), (4, 8, 16, 32), 16, frozen_stages=1).train()
    stages = maps.model.stages if depth == 4 else maps.backbone.blocks
    assert [stage.training for stage in stages] == [False] + [True] * (depth - 1)
    assert not any(parameter.requires_grad for parameter in stages[0].parameters())
    assert all(parameter.requires_grad for parameter in stages[1].parameters())
    images = torch.randn(1, 3, 64, 64)
    with dge_models.collect_routings(maps) as collected:
        maps(images), maps(images)
    first, second = ([routing.choice for routing in forward] for forward in collected.records[0].forwards)
    assert torch.equal(first[0], second[0])
    assert maps.eval().train(False) is maps


def test_the_routed_model_inside() -> None:
    model = pyramid()
    assert routed_backbone(build_maps(model, (4, 8), 16)) is model
    assert routed_backbone(build_maps(pyramid(routed=False), (4, 8), 16)) is None


@pytest.mark.parametrize(
    ("strides", "frozen", "words"),
    [
        ((8, 32), 0, r"head.strides: got \[8, 32\], expected each to be twice"),
        ((32, 64), 0, r"head.strides: got \[32, 64\], expected some of the backbone's own, \[4, 8, 16, 32\]"),
        ((8, 16), 5, "head.frozen_stages: got 5, expected 0 to 4"),
    ],
)
def test_what_a_pyramid_has_not(strides: tuple[int, ...], frozen: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_maps(pyramid(), strides, 16, frozen)


def test_what_a_vision_transformer_has_not() -> None:
    with pytest.raises(UserError, match="head: frozen_blocks: got 3; expected 0 to 2"):
        build_maps(vit(), (8, 16), 16, 3)
    with pytest.raises(UserError, match="got a Linear, expected a pyramid or a plain vision transformer"):
        build_maps(nn.Linear(1, 1), (8,), 16)


def test_it_has_no_classifier() -> None:
    with pytest.raises(UserError, match=r"model.kwargs.num_classes: got 5, expected none"):
        create_backbone(ModelConfig(name="pvt_tiny_256", kwargs={"num_classes": 5}))
