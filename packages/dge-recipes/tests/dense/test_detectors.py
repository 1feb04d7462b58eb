"""torchvision's detectors on our backbones."""

from typing import Any

import pytest
import torch
from dense_networks import boxes, detector, pyramid, vit
from torch import nn

from dge_recipes.config.head import HeadConfig
from dge_recipes.dense import build_detector
from dge_recipes.errors import UserError

_KINDS = ("retinanet", "faster_rcnn", "mask_rcnn")


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("backbone", [pyramid, vit])
def test_it_learns_from_images_of_two_sizes_with_and_without_objects(kind: str, backbone: Any) -> None:
    model = detector(kind, backbone())
    terms = model(
        [torch.randn(3, 64, 64), torch.randn(3, 50, 64)], [boxes(2), {**boxes(0), "masks": torch.zeros(0, 50, 64)}]
    )
    loss = sum(terms.values())
    loss.backward()
    assert torch.isfinite(loss)
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not idle


@pytest.mark.parametrize("kind", _KINDS)
def test_boxes_are_in_the_pixels_of_the_image_given(kind: str) -> None:
    model = detector(kind, score_threshold=0.0, detections_per_image=5).eval()
    images = [torch.randn(3, 32, 128), torch.randn(3, 200, 100)]
    with torch.no_grad():
        found = model(images)
    assert all(len(each["boxes"]) == 5 for each in found)
    assert all(each["boxes"][:, 0::2].max() <= image.shape[2] for each, image in zip(found, images, strict=True))
    assert found[1]["boxes"][:, 1::2].max() > 64 or kind != "retinanet"
    assert all(set(each["labels"].tolist()) <= {0, 1, 2, 3} for each in found)
    if kind == "mask_rcnn":
        assert found[1]["masks"].shape == (5, 1, 200, 100)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("backbone", [pyramid, vit])
def test_anchors_fit_the_strides(kind: str, backbone: Any) -> None:
    strides = (8, 16, 32, 64, 128) if kind == "retinanet" else (4, 8, 16, 32, 64)
    model = detector(kind, backbone()).eval()
    with torch.no_grad():
        maps = model.backbone(torch.randn(1, 3, 128, 128))
    assert [128 // each.shape[2] for each in maps.values()] == list(strides)
    anchors = model.anchor_generator if kind == "retinanet" else model.rpn.anchor_generator
    scale = 4 if kind == "retinanet" else 8
    assert [sizes[0] for sizes in anchors.sizes] == [stride * scale for stride in strides]


@pytest.mark.parametrize("kind", _KINDS)
def test_strides_and_anchors_for_small_images(kind: str) -> None:
    model = detector(kind, strides=(8, 16), anchor_scale=2.0)
    anchors = model.anchor_generator if kind == "retinanet" else model.rpn.anchor_generator
    assert [sizes[0] for sizes in anchors.sizes] == [16, 32]
    sum(model([torch.randn(3, 64, 64)], [boxes()]).values()).backward()


def test_group_norm_in_the_neck_and_the_towers() -> None:
    model = detector("retinanet", norm="group")
    norms = [name for name, part in model.named_modules() if isinstance(part, nn.GroupNorm)]
    assert {name.split(".")[0] for name in norms} == {"backbone", "head"}
    with pytest.raises(UserError, match=r"head.channels: got 48, expected a multiple of 32 with head.norm=group"):
        detector("retinanet", norm="group", channels=48)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (
            {"kind": "upernet"},
            "head.kind: got upernet, expected one of retinanet, faster_rcnn, mask_rcnn for detection",
        ),
        ({"kind": "retinanet", "strides": (16, 32, 64)}, r"1 of them above the backbone's last, 32; expected 0 or 2"),
        (
            {"kind": "faster_rcnn", "strides": (32, 64, 128)},
            r"2 of them above the backbone's last, 32; expected 0 or 1",
        ),
    ],
)
def test_heads_that_do_not_fit(head: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        detector(**head)


def test_a_size_is_needed() -> None:
    with pytest.raises(UserError, match=r"head.short_side: got null, expected pixels"):
        build_detector(pyramid(), HeadConfig(kind="retinanet"), 3)


def test_short_sides_are_drawn_for_each_image_in_training_alone() -> None:
    model = detector("retinanet", short_sides=(48, 64, 56), long_side=96)
    sizes: list[tuple[int, int]] = []
    model.transform.register_forward_hook(lambda _, __, out: sizes.extend(out[0].image_sizes))
    images, targets = [torch.randn(3, 64, 96)] * 8, [boxes(2)] * 8
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        model(images, targets)
    assert {rows for rows, _ in sizes} == {48, 56, 64}
    assert sizes[:8] == sizes[16:] != sizes[8:16]
    sizes.clear()
    with torch.no_grad():
        model.eval()(images)
    assert set(sizes) == {(64, 96)}
    with pytest.raises(UserError, match=r"head.short_sides: got \[48, 56\], expected head.short_side=64 among them"):
        detector("retinanet", short_sides=(48, 56))
