"""Backbones under torchvision's Mask R-CNN and in segmentation_models_pytorch: losses, budget, gradients, padding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import timm
import torch
from companion import companion
from small_models import SMALL_PYRAMID, scatter_routing
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

from dge_models import (
    BudgetLoss,
    SegmentationEncoder,
    SimpleFeaturePyramid,
    collect_routings,
    follow_padding,
    forward_padded,
    from_timm,
    padded,
)
from dge_models.routed import routed_blocks

SIZES = [(256, 320), (250, 333)]
each_size = pytest.mark.parametrize("size", SIZES)
TINY_VIT: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}


class _WithFPN(nn.Module):
    """A backbone of timm's and torchvision's feature pyramid network."""

    def __init__(self, body: Any, out_channels: int = 16) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(key), part) for key, part in enumerate(self.body(images))))
        return maps


def _pvt(**kwargs: Any) -> nn.Module:
    return _WithFPN(scatter_routing(timm.create_model("pvt_dge_s124_tiny_256", features_only=True, **kwargs)))


def _vit(frozen_blocks: int = 0, **kwargs: Any) -> nn.Module:
    plain = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True, **kwargs)
    return SimpleFeaturePyramid(scatter_routing(from_timm(plain)), out_channels=16, frozen_blocks=frozen_blocks)


BACKBONES = {"pvt_dge_s124_tiny_256": _pvt, "vit_small_patch16_224": _vit}
each_backbone = pytest.mark.parametrize("name", BACKBONES)


def _small(name: str, **kwargs: Any) -> Any:
    settings = {key: value for key, value in SMALL_PYRAMID.items() if key != "num_classes"}
    return BACKBONES[name](**{**(settings if "pvt" in name else TINY_VIT), **kwargs})


def _mask_rcnn(backbone: nn.Module, size: tuple[int, int]) -> Any:
    anchors = AnchorGenerator(tuple((side,) for side in (16, 32, 64, 128)), ((1.0,),) * 4)
    few: dict[str, Any] = {"rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 8, "box_detections_per_img": 3}
    detector: Any = MaskRCNN(backbone, 3, rpn_anchor_generator=anchors, min_size=min(size), max_size=max(size), **few)
    return detector


def _targets(batch: int) -> list[dict[str, Tensor]]:
    masks = torch.zeros(1, 320, 333, dtype=torch.uint8)
    masks[:, 20:120, 30:150] = 1
    box = torch.tensor([[30.0, 20.0, 150.0, 120.0]])
    return [{"boxes": box, "labels": torch.tensor([1]), "masks": masks} for _ in range(batch)]


def _of_size(targets: list[dict[str, Tensor]], images: list[Tensor]) -> list[dict[str, Tensor]]:
    return [
        {**target, "masks": target["masks"][:, : image.shape[1], : image.shape[2]]}
        for target, image in zip(targets, images, strict=True)
    ]


def _step(detector: Any, images: list[Tensor]) -> Any:
    """One forward and backward pass with the budget; the routings."""
    with collect_routings(detector) as collected:
        losses = detector(images, _of_size(_targets(len(images)), images))
    (sum(losses.values()) + BudgetLoss()(collected.model, collected.routings)).backward()
    return collected.routings


def _assert_trained(backbone: nn.Module) -> None:
    gates = [block.router.gate.weight.grad for block in routed_blocks(backbone)]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in gates)
    assert any(bool(grad.any()) for grad in gates if grad is not None)
    missing = [name for name, each in backbone.named_parameters() if each.requires_grad and each.grad is None]
    # A detector reads maps alone; the library's DPT keeps a classifier that it does not call.
    assert all(name.endswith(("cls_token", "norm.weight", "norm.bias")) or ".head." in name for name in missing)


@each_backbone
@each_size
def test_mask_rcnn_trains_and_detects(name: str, size: tuple[int, int]) -> None:
    detector = _mask_rcnn(BACKBONES[name](), size)
    follow_padding(detector)
    images = [torch.rand(3, *size)]
    routings = _step(detector.train(), images)
    first = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
    stride = 4 if "pvt" in name else 16
    assert routings[0].grid == (first[0] // stride, first[1] // stride)
    _assert_trained(detector.backbone)
    with torch.no_grad():
        found = detector.eval()(images)
    assert {"boxes", "labels", "scores", "masks"} <= set(found[0])


def _padded_batch(canvas: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    batch = torch.zeros(2, 3, *canvas)
    for place, (rows, cols) in enumerate(SIZES):
        batch[place, :, :rows, :cols] = torch.rand(3, rows, cols, generator=generator)
    return batch


@each_backbone
def test_images_of_several_sizes_do_not_see_each_others_padding(name: str) -> None:
    backbone = _small(name).eval()
    body = getattr(backbone, "body", backbone)
    results = []
    for canvas in ((256, 352), (384, 448)):
        with torch.no_grad(), padded(body, SIZES), collect_routings(body) as collected:
            maps = body(_padded_batch(canvas))
        results.append((list(maps.values()) if isinstance(maps, dict) else maps, collected.routings))
    (maps, routings), (wider, others) = results
    for got, own in zip(wider, maps, strict=True):
        torch.testing.assert_close(got[:, :, : own.shape[2], : own.shape[3]], own, rtol=0, atol=1e-5)
    for got, own in zip(others, routings, strict=True):
        rows, cols = own.choice.shape[1:]
        assert torch.equal(got.choice[:, :rows, :cols], own.choice)
        assert torch.equal(got.queries, own.queries)


@each_backbone
def test_mask_rcnn_finds_in_an_image_what_it_finds_in_it_alone(name: str) -> None:
    detector = _mask_rcnn(_small(name), (256, 320)).eval()
    detector.transform.min_size, detector.transform.max_size = (250,), 340
    detector.roi_heads.score_thresh = 0.0
    follow_padding(detector)
    images = [torch.rand(3, *size) for size in (*SIZES, (200, 330))]
    with torch.no_grad():
        together = detector(images)
        for got, image in zip(together, images, strict=True):
            (own,) = detector([image])
            assert len(own["boxes"]) == 3
            assert torch.equal(got["labels"], own["labels"])
            for key in ("scores", "masks", "boxes"):
                torch.testing.assert_close(got[key], own[key], rtol=1e-5, atol=1e-3 if key == "boxes" else 1e-5)


# Between two graphs torch.compile looks at gradients of tensors that have none; it hides the warning, not the error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@each_backbone
def test_a_compiled_backbone_trains_alike(name: str) -> None:
    torch.compiler.reset()
    gradients, losses = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        detector = _mask_rcnn(_small(name, **({"depths": (1, 1, 1, 1)} if "pvt" in name else {"depth": 1})), SIZES[0])
        follow_padding(detector.train())
        if compiled:
            detector.backbone.compile(backend="eager")
        for size in SIZES[1:] if "pvt" in name else SIZES:  # a pyramid has four grids to compile, at every size
            torch.manual_seed(1)
            images = [torch.rand(3, *size)]
            with collect_routings(detector) as collected:
                parts = detector(images, _of_size(_targets(1), images))
            loss = sum(parts.values()) + BudgetLoss()(collected.model, collected.routings)
            loss.backward()
            losses.append(loss.detach())
        gradients.append([block.router.gate.weight.grad for block in routed_blocks(detector)])
    torch.testing.assert_close(losses[len(losses) // 2 :], losses[: len(losses) // 2])
    for got, own in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, own, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


@each_backbone
def test_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        detector = _mask_rcnn(_small(name), (256, 320)).train()
        follow_padding(detector)
        model = detector.backbone.body.model if "pvt" in name else detector.backbone.backbone
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        _step(detector, [torch.rand(3, *size) for size in SIZES])
        gradients.append({key: each.grad for key, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, own in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], own, msg=key)


def test_frozen_parts_stay_as_they_are() -> None:
    detector = _mask_rcnn(_small("vit_small_patch16_224", frozen_blocks=1), (256, 320)).train()
    _step(detector, [torch.rand(3, 256, 320)])
    frozen = {name for name, each in detector.backbone.backbone.named_parameters() if each.grad is None}
    assert {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} <= frozen
    assert not any(name.startswith("blocks.1.") for name in frozen)
    detector = _mask_rcnn(_small("pvt_dge_s124_tiny_256"), (256, 320)).train()
    stages = detector.backbone.body.model.stages
    stages[0].requires_grad_(False)
    _step(detector, [torch.rand(3, 256, 320)])
    assert all(each.grad is None for each in stages[0].parameters())
    assert all(block.mlp.fc1.weight.grad is not None for block in stages[1].blocks)


def test_retinanet_follows_padding() -> None:
    backbone = _small("pvt_dge_s124_tiny_256")
    anchors = AnchorGenerator(tuple((side,) for side in (16, 32, 64, 128)), ((1.0,),) * 4)
    detector: Any = RetinaNet(backbone, 3, anchor_generator=anchors, min_size=250, max_size=340).train()
    follow_padding(detector)
    routings = _step(detector, [torch.rand(3, *size) for size in SIZES])
    assert routings[0].real_grids == ((64, 80), (64, 88))
    _assert_trained(backbone)


@pytest.fixture
def smp() -> Iterator[Any]:
    library = companion("segmentation_models_pytorch")
    before = dict(library.encoders.encoders)
    yield library
    library.encoders.encoders.clear()
    library.encoders.encoders.update(before)


ARCHITECTURES = {
    "FPN": {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32},
    "UPerNet": {"decoder_channels": 16},
    "Unet": {"decoder_channels": (16, 8, 8, 8, 8)},
    "DPT": {"decoder_readout": "ignore", "decoder_intermediate_channels": (8,) * 4, "decoder_fusion_channels": 8},
}


def _segment(model: Any, size: tuple[int, int]) -> Any:
    """Train on images of this size, padded to what the library takes; logits of the images' own pixels."""
    rows, cols = -(-size[0] // 32) * 32, -(-size[1] // 32) * 32
    images = torch.zeros(2, 3, rows, cols)
    images[:, :, : size[0], : size[1]] = torch.rand(2, 3, *size)
    with padded(model, [size] * 2), collect_routings(model) as collected:
        logits = model(images)[:, :, : size[0], : size[1]]
    (logits.square().mean() + BudgetLoss()(collected.model, collected.routings)).backward()
    return logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@each_size
def test_segmentation_models_take_the_pyramid_by_name(smp: Any, architecture: str, size: tuple[int, int]) -> None:
    settings = ARCHITECTURES[architecture]
    name = "tu-pvt_dge_s124_tiny_256"
    model = getattr(smp, architecture)(name, encoder_weights=None, classes=4, **settings).train()
    scatter_routing(model.encoder)
    assert _segment(model, size).shape == (2, 4, *size)
    _assert_trained(model.encoder)


def _segmenter(smp: Any, architecture: str, **encoder: Any) -> Any:
    torch.manual_seed(0)
    settings = {**ARCHITECTURES[architecture], **encoder}
    model = getattr(smp, architecture)("tu-pvt_dge_s124_tiny_256", encoder_weights=None, classes=4, **settings)
    scatter_routing(model.encoder)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_segmentations_do_not_depend_on_how_much_was_padded(smp: Any, architecture: str) -> None:
    model = _segmenter(smp, architecture).eval()
    results = []
    for canvas in ((256, 352), (384, 448)):
        with torch.no_grad(), collect_routings(model) as collected:
            logits = forward_padded(model, _padded_batch(canvas), SIZES)
        assert logits.shape == (2, 4, *canvas)
        results.append((logits, collected.routings))
    (logits, routings), (wider, others) = results
    for place, (rows, cols) in enumerate(SIZES):
        got, own = wider[place, :, :rows, :cols], logits[place, :, :rows, :cols]
        assert own.any()
        torch.testing.assert_close(got, own, rtol=0, atol=1e-5)
    for got, own in zip(others, routings, strict=True):
        rows, cols = own.choice.shape[1:]
        assert torch.equal(got.choice[:, :rows, :cols], own.choice)
    with torch.no_grad(), padded(model, SIZES):  # the encoder alone, and zeros around its maps
        inside = [model(_padded_batch(canvas))[0, :, :256, :320] for canvas in ((256, 352), (384, 448))]
    assert not torch.allclose(*inside, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@each_size
def test_a_compiled_encoder_under_a_segmentation_model_trains_alike(smp: Any, size: tuple[int, int]) -> None:
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        model = _segmenter(smp, "FPN", depths=(1, 1, 1, 1)).train()
        if compiled:
            model.encoder.compile(backend="eager")
        torch.manual_seed(1)
        logits = _segment(model, size)
        gates = [block.router.gate.weight.grad for block in routed_blocks(model)]
        results.append((logits.detach(), gates))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    for got, own in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(got, own, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("architecture", ["FPN", "UPerNet"])
@each_size
def test_segmentation_models_take_a_converted_transformer(smp: Any, architecture: str, size: tuple[int, int]) -> None:
    pyramid = _vit(**TINY_VIT)
    smp.encoders.encoders["vit"] = {
        "encoder": partial(SegmentationEncoder, pyramid),
        "params": {},
        "pretrained_settings": {},
    }
    model = getattr(smp, architecture)("vit", encoder_weights=None, classes=4, **ARCHITECTURES[architecture]).train()
    assert model.encoder.pyramid is pyramid
    assert _segment(model, size).shape == (2, 4, *size)
    _assert_trained(pyramid)


def test_what_segmentation_models_cannot_have(smp: Any) -> None:
    pyramid = _vit(**TINY_VIT)
    smp.encoders.encoders["vit"] = {
        "encoder": partial(SegmentationEncoder, pyramid),
        "params": {},
        "pretrained_settings": {},
    }
    with pytest.raises(ValueError, match="in_channels: got 4; expected 3, as the transformer was made"):
        smp.FPN("vit", encoder_weights=None, in_channels=4)
    with pytest.raises(ValueError, match="output_stride: got 16; expected 32"):
        smp.DeepLabV3("vit", encoder_weights=None, encoder_output_stride=16)
    with pytest.raises(ValueError, match="depth: got 1; expected 2 to 5"):
        SegmentationEncoder(pyramid, depth=1)
    plain = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True, **TINY_VIT)
    with pytest.raises(
        ValueError, match=r"pyramid: got maps of strides \[\(16\.0, 16\.0\)\]; expected \(4, 8, 16, 32\)"
    ):
        SegmentationEncoder(SimpleFeaturePyramid(plain, scales=(1,)))
    assert SegmentationEncoder(pyramid, depth=3).out_channels == [3, 0, 16, 16]
