"""What timm's own model tests ask of every model, for every name that this package registers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import NAMES, build_small, small_config
from timm.data import resolve_data_config
from timm.models import FeatureInfo, create_feature_extractor, group_parameters, save_for_hf
from torch import Tensor, nn

from dge_models import deterministic_routing, set_training_mode
from dge_models.routed import routed_blocks

PYRAMIDS = [name for name in NAMES if "pvt" in name]
every_name = pytest.mark.parametrize("name", NAMES)


def _images(name: str, batch: int = 2, channels: int = 3) -> Tensor:
    size = small_config(name)["img_size"]
    return torch.randn(batch, channels, size, size)


def _modes(name: str) -> list[str | None]:
    return ["dense", "sparse"] if "dge" in name else [None]


def _loss(out: Any) -> Tensor:
    return sum((part.square().mean() for part in out), torch.zeros(())) if isinstance(out, tuple) else out.mean()


def test_all_names_are_registered() -> None:
    deit = [f"deit_{kind}{size}_patch16_256" for kind in ("", "dge_s124_") for size in ("tiny", "small", "base")]
    distilled = [f"deit_dge_s124_{size}_distilled_patch16_256" for size in ("tiny", "small", "base")]
    sizes = ("tiny", "small", "medium", "large")
    pvt = [f"pvt_{kind}{size}_256" for kind in ("", "dge_s124_") for size in sizes]
    dpvt = [f"dpvt_{kind}{size}_256" for kind in ("", "dge_s124_") for size in sizes]
    assert sorted(NAMES) == sorted(deit + distilled + pvt + dpvt)


@every_name
def test_forward_and_gradient_checkpointing(name: str) -> None:
    model, images = build_small(name), _images(name)
    logits = model(images)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images), logits)


@every_name
def test_a_backward_pass_reaches_every_parameter(name: str) -> None:
    for mode in _modes(name):
        model = build_small(name, num_classes=42, drop_path_rate=0.1).train()
        if mode is not None:
            set_training_mode(model, mode)  # type: ignore[arg-type]
        out = model(_images(name))
        _loss(out).backward()
        assert [part for part, value in model.named_parameters() if value.grad is None] == []
        assert (out[0] if isinstance(out, tuple) else out).shape[-1] == 42


@every_name
def test_full_size_models_fit_their_configuration(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    config = model.default_cfg
    names = dict(model.named_parameters())
    classifiers = config["classifier"] if isinstance(config["classifier"], tuple) else (config["classifier"],)
    assert all(f"{part}.weight" in names for part in (*classifiers, config["first_conv"]))
    assert config["input_size"] == (3, 256, 256)
    assert int(256 / resolve_data_config(pretrained_cfg=config)["crop_pct"]) == 292
    assert (model.num_classes, model.num_features) == (1000, model.head_hidden_size)


@every_name
def test_heads_come_off_and_change(name: str) -> None:
    model, images = build_small(name), _images(name)
    features = model.forward_features(images)
    logits = model.forward_head(features)
    torch.testing.assert_close(model(images), logits)
    pooled = model.forward_head(features, pre_logits=True)
    pooled = pooled if isinstance(pooled, Tensor) else pooled[0]
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(images).shape == pooled.shape
    assert build_small(name, num_classes=0)(images).shape == pooled.shape
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    heads = model.get_classifier()
    assert all(head.out_features == 5 for head in (heads if isinstance(heads, (tuple, nn.ModuleList)) else (heads,)))


@every_name
def test_features_have_the_channels_and_strides_they_name(name: str) -> None:
    size = 96 if name in PYRAMIDS else 32
    model = timm.create_model(name, features_only=True, **{**small_config(name), "img_size": size}).eval()
    maps = model(torch.randn(1, 3, size, size))
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    assert len(maps) == len(channels) == len(strides) >= 3
    for part, width, stride in zip(maps, channels, strides, strict=True):
        assert part.shape == (1, width, size // stride, size // stride)
        assert part.isfinite().all()


@every_name
def test_intermediates_agree_with_features_with_and_without_checkpointing(name: str) -> None:
    model, images = build_small(name), _images(name)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    features, maps = model.forward_intermediates(images, output_fmt="NCHW")
    assert [part.shape[1] for part in maps] == info.channels()
    torch.testing.assert_close(features, model.forward_features(images))
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(images)[0], features)


@every_name
def test_graphs_compute_and_train_what_the_model_does(name: str) -> None:
    """torch.fx, through timm's extractor: equal to the bit in evaluation, every parameter trained."""
    model, images = build_small(name), _images(name)
    last = "head_dist" if "distilled" in name else "head"
    graph = create_feature_extractor(model, [last])
    with torch.inference_mode():
        expected = model(images)
        out = graph(images)[last]
    assert out.shape == expected.shape
    if last == "head":
        assert torch.equal(out, expected)
    _loss(create_feature_extractor(model.train(), [last])(images)[last]).backward()
    unused = {"head.weight", "head.bias"} if last == "head_dist" else set()
    assert {part for part, value in model.named_parameters() if value.grad is None} <= unused


@every_name
def test_a_local_directory_gives_the_model_back(name: str, tmp_path: Path) -> None:
    model, images = build_small(name), _images(name)
    save_for_hf(model, tmp_path, model_args=small_config(name))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images), model(images))


@every_name
def test_copies_and_pickles_after_a_training_step(name: str) -> None:
    model, images = build_small(name).train(), _images(name)
    _loss(model(images)).backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    model.eval()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(images), model(images))
        clone.load_state_dict(model.state_dict())


@every_name
def test_channels_device_and_dtype_are_arguments(name: str) -> None:
    assert build_small(name, in_chans=1)(_images(name, channels=1)).shape == (2, 7)
    placed = timm.create_model(name, device="meta", dtype=torch.bfloat16, **small_config(name))
    assert {(value.device.type, value.dtype) for value in placed.parameters()} == {("meta", torch.bfloat16)}
    if name in PYRAMIDS:  # the oldest timm's vision transformers leave a new head on the CPU
        placed.reset_classifier(3)
        assert (placed.head.weight.device.type, placed.head.weight.dtype) == ("meta", torch.bfloat16)


@every_name
def test_parameter_groups_cover_every_parameter_once(name: str) -> None:
    model = build_small(name)
    assert {part for part in dict(model.named_parameters()) if part.endswith(("pos_embed", "cls_token"))} <= set(
        model.no_weight_decay()
    )
    grouped = group_parameters(model, model.group_matcher())
    assert sorted(part for parts in grouped.values() for part in parts) == sorted(dict(model.named_parameters()))
    blocks = sum(len(stage.blocks) for stage in model.stages) if name in PYRAMIDS else len(model.blocks)
    assert len(grouped) >= blocks + 1
    group_parameters(model, model.group_matcher(coarse=True))


@every_name
def test_a_resized_model_takes_the_new_size(name: str) -> None:
    model = build_small(name)
    size = (64, 96) if name in PYRAMIDS else (20, 36)
    model.set_input_size(size)
    assert model(torch.randn(1, 3, *size)).shape == (1, 7)


@every_name
def test_hooks_on_blocks_see_tokens(name: str) -> None:
    model, seen = build_small(name), []
    blocks = [block for stage in model.stages for block in stage.blocks] if name in PYRAMIDS else list(model.blocks)
    for block in blocks:
        block.register_forward_hook(lambda _module, _args, out: seen.append(out))
    model(_images(name))
    assert len(seen) == len(blocks)
    assert all(isinstance(tokens, Tensor) and tokens.ndim == 3 for tokens in seen)


@every_name
def test_initialising_again_keeps_the_routers_bias(name: str) -> None:
    model = build_small(name)
    with deterministic_routing():
        model.init_weights()
    for block in routed_blocks(model):
        torch.testing.assert_close(block.router.gate.bias.softmax(0)[0], torch.tensor(0.95))
