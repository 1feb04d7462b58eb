"""Multiply-accumulates of backbone, neck and head."""

from typing import Any

import pytest
import torch
from dense_networks import detector, pyramid, scattered, segmenter, vit
from torch.utils.flop_counter import FlopCounterMode

import dge_models
from dge_recipes.dense import forward_counted, macs


@pytest.mark.parametrize("backbone", [pyramid, vit])
@pytest.mark.parametrize("kind", ["retinanet", "semantic_fpn", "upernet"])
def test_parts_add_up_to_what_is_run(kind: str, backbone: Any) -> None:
    make = detector if kind == "retinanet" else segmenter
    model = make(kind, backbone(routed=False)).eval()
    images: Any = torch.randn(2, 3, 64, 96) if make is segmenter else [torch.randn(3, 64, 64)] * 2
    output, counts = forward_counted(model, images)
    inside = model.encoder if make is segmenter else model.backbone
    sizes: list[Any] = []
    handle = inside.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0]))
    with torch.no_grad(), FlopCounterMode(display=False) as everything:
        again = model(images)
    handle.remove()
    body = next(part for part in model.modules() if hasattr(part, "forward_intermediates"))
    with torch.no_grad(), FlopCounterMode(display=False) as backbone_alone:
        body.forward_features(sizes[0])
    rest = (everything.get_total_flops() - backbone_alone.get_total_flops()) / 2 / 2
    assert counts.neck + counts.head == rest
    expected = dge_models.count_macs(model, sizes[0])
    assert torch.equal(counts.backbone, expected.total)
    assert counts.static_backbone == expected.static_total
    assert torch.equal(counts.ratio, torch.ones(2, dtype=torch.float64))
    if make is segmenter:
        assert torch.equal(output, again)


@pytest.mark.parametrize("backbone", [pyramid, vit])
def test_a_routed_backbone_is_counted_image_by_image(backbone: Any) -> None:
    model = scattered(segmenter(backbone=backbone())).eval()
    images = torch.randn(4, 3, 96, 64)
    _, counts = forward_counted(model, images)
    expected = dge_models.count_macs(model, images)
    assert torch.equal(counts.backbone, expected.total)
    assert counts.static_backbone == expected.static_total
    assert len(set(counts.backbone.tolist())) > 1


def test_a_two_stage_head_is_an_upper_bound_and_the_same_for_all_images() -> None:
    model = detector("mask_rcnn", pyramid(routed=False), detections_per_image=7, score_threshold=0.0).eval()
    found, counts = forward_counted(model, [torch.randn(3, 64, 64)])
    with torch.no_grad(), FlopCounterMode(display=False) as head:
        model.roi_heads.mask_head(torch.zeros(7, 32, 14, 14))
    _, others = forward_counted(model, [torch.zeros(3, 64, 64)])
    assert counts.head == others.head > head.get_total_flops() / 2
    boxes_alone = detector("faster_rcnn", pyramid(routed=False)).eval()
    assert forward_counted(boxes_alone, [torch.zeros(3, 64, 64)])[1].head < counts.head
    assert len(found[0]["boxes"]) == 7


def test_sizes_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(macs, "_SIZES", 2)
    model = segmenter(backbone=pyramid(routed=False)).eval()
    first = forward_counted(model, torch.zeros(1, 3, 64, 32))[1]
    for width in (64, 96, 128):
        assert forward_counted(model, torch.zeros(1, 3, 64, width))[1].neck == first.neck * width / 32
    assert list(macs._counted[model]) == [(64, 96), (64, 128)]


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("backbone", [pyramid, vit])
def test_a_backbone_spends_nothing_on_what_a_detector_pads(routed: bool, backbone: Any) -> None:
    model = scattered(detector("retinanet", backbone(routed), strides=(8, 16, 32), long_side=96)).eval()
    wide, tall = torch.randn(3, 64, 96), torch.randn(3, 96, 64)
    _, together = forward_counted(model, [wide, tall])
    alone = [forward_counted(model, [image])[1] for image in (wide, tall)]
    assert together.backbone.tolist() == [float(counts.backbone) for counts in alone]
    assert together.static_backbone == alone[0].static_backbone == alone[1].static_backbone
    assert (together.neck, together.head) == (alone[0].neck, alone[0].head)
