from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from small_models import SMALL_PYRAMID, Build

NAMES = ["pvt_tiny_256", "pvt_dge_s124_tiny_256", "dpvt_tiny_256", "dpvt_dge_s124_tiny_256"]
every_kind = pytest.mark.parametrize("name", NAMES)


def _images(size: tuple[int, int] = (64, 96)) -> torch.Tensor:
    return torch.randn(2, 3, *size)


def _backbone(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, features_only=True, **{**SMALL_PYRAMID, **kwargs}).eval()


@every_kind
def test_a_backbone_gives_the_four_stages_maps(small: Build, name: str) -> None:
    backbone, model, images = _backbone(name), small(name), _images()
    assert backbone.feature_info.channels() == [8, 16, 24, 32]
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert not any(key.startswith(("model.head", "model.norm")) for key in backbone.state_dict())
    backbone.model.load_state_dict(model.state_dict(), strict=False)
    maps = backbone(images)
    assert [tuple(part.shape) for part in maps] == [
        (2, 8, 16, 24),
        (2, 16, 8, 12),
        (2, 24, 4, 6),
        (2, 32, 2, 3),
    ]
    for got, expected in zip(maps, model.forward_intermediates(images, intermediates_only=True), strict=True):
        assert torch.equal(got, expected)


@every_kind
@pytest.mark.parametrize(("indices", "strides"), [((1, 2), [8, 16]), ((-1,), [32]), (2, [16, 32]), ((0,), [4])])
def test_a_backbone_keeps_the_stages_that_are_asked_for(name: str, indices: Any, strides: list[int]) -> None:
    backbone = _backbone(name, out_indices=indices)
    assert backbone.feature_info.reduction() == strides
    maps = backbone(_images())
    assert [64 // part.shape[2] for part in maps] == strides
    assert len(backbone.model.stages) == {8: 2, 16: 3, 32: 4, 4: 1}[strides[-1]]
    sum(part.square().mean() for part in backbone.train()(_images())).backward()


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_backbone_without_class_token(name: str) -> None:
    backbone = _backbone(name, class_token=False, global_pool="avg")
    assert not any("cls_token" in key for key in backbone.state_dict())
    maps = backbone(_images())
    assert maps[-1].shape == (2, 32, 2, 3)
    sum(part.square().mean() for part in maps).backward()
    assert all(value.grad is not None for value in backbone.parameters())


@every_kind
def test_intermediates_in_every_form(small: Build, name: str) -> None:
    model, images = small(name), _images()
    prefix = model.num_prefix_tokens
    assert prefix == (0 if name.startswith("dpvt") else 1)
    features, maps = model.forward_intermediates(images)
    torch.testing.assert_close(features, model.forward_features(images))
    last = model.forward_intermediates(images, indices=1, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close(last[0].permute(0, 3, 1, 2), maps[3])
    flat = model.forward_intermediates(images, indices=[1, 3], intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(flat[0].transpose(1, 2), maps[1].flatten(2))
    assert flat[1].shape == (2, 6, 32)
    pairs = model.forward_intermediates(images, intermediates_only=True, return_prefix_tokens=True)
    assert [part.shape[1] for _, part in pairs] == [0, 0, 0, prefix]
    torch.testing.assert_close(model.norm(pairs[3][1]), features[:, :prefix])
    normed = model.forward_intermediates(images, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[3].flatten(2).transpose(1, 2), features[:, prefix:])
    assert torch.equal(normed[0], maps[0])
    early, kept = model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    assert early.shape == (2, 96, 16)
    assert torch.equal(kept[1], maps[1])
    named = model.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
    assert set(named) == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    with pytest.raises(ValueError, match="output_fmt: got 'NCL'; expected one of 'NCHW', 'NHWC', 'NLC'"):
        model.forward_intermediates(images, output_fmt="NCL")


@every_kind
@pytest.mark.parametrize("size", [(32, 32), (56, 72), (96, 64)])
def test_a_resized_model_computes_what_interpolation_at_call_time_does(
    small: Build, name: str, size: tuple[int, int]
) -> None:
    model, images = small(name), _images(size)
    expected = model(images)
    model.set_input_size(size)
    assert model.stages[1].pos_embed.shape[1] == (size[0] // 8) * (size[1] // 8)
    torch.testing.assert_close(model(images), expected)
    assert model.img_size == size


@every_kind
@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax", ""])
def test_every_pooling(small: Build, name: str, pool: str) -> None:
    if pool == "token" and name.startswith("dpvt"):
        with pytest.raises(ValueError, match="global_pool: got 'token'; expected another pooling, the model has no"):
            small(name, global_pool=pool)
        return
    model, images = small(name, global_pool=pool), _images()
    tokens = model.forward_features(images)
    spatial = tokens[:, model.num_prefix_tokens :]
    expected = {
        "token": tokens[:, 0],
        "avg": spatial.mean(1),
        "max": spatial.amax(1),
        "avgmax": (spatial.mean(1) + spatial.amax(1)) / 2,
        "": tokens,
    }[pool]
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), expected)
    torch.testing.assert_close(model(images), model.head(expected))
    other = small(name)
    other.load_state_dict(model.state_dict())
    other.reset_classifier(0, pool)
    torch.testing.assert_close(other(images), expected)


def test_learning_rates_fall_from_the_head_to_the_stem(small: Build) -> None:
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(small(NAMES[1]), layer_decay=0.5, no_weight_decay_list=["stages.0.pos_embed"])
    scales = {id(value): group["lr_scale"] for group in groups for value in group["params"]}
    model = small(NAMES[1])
    assert len({round(scale, 9) for scale in scales.values()}) >= 6
    assert model.no_weight_decay() == {*(f"stages.{index}.pos_embed" for index in range(4)), "stages.3.cls_token"}
    assert small(NAMES[3]).no_weight_decay() == {f"stages.{index}.pos_embed" for index in range(4)}


@every_kind
def test_bad_changes_are_refused(small: Build, name: str) -> None:
    model = small(name)
    with pytest.raises(ValueError, match="patch_size: got 8; expected None"):
        model.set_input_size(64, patch_size=8)
    with pytest.raises(ValueError, match=r"img_size: got \(64, 20\); expected at least 32 pixels"):
        model.set_input_size((64, 20))
    with pytest.raises(ValueError, match="global_pool: got 'catavgmax'; expected one of"):
        model.reset_classifier(3, "catavgmax")
    assert model.num_classes == 7
