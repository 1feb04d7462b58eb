"""What a torchvision detector finds in an image doesn't depend on the others that it is padded with."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import SMALL_PYRAMID, scatter_routing
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from dge_models import SimpleFeaturePyramid, collect_routings, follow_padding, from_timm, padded
from dge_models import padding as padding_module
from dge_models.detector_padding import same_sizes

SIZES = [(64, 90), (50, 128), (64, 70)]


def _model(name: str = "pvt_dge_s124_tiny_256", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL_PYRAMID, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return scatter_routing(model).eval()


def _batch() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(3, *size, generator=generator) for size in SIZES]
    return torch.stack([F.pad(each, (0, 128 - each.shape[2], 0, 64 - each.shape[1])) for each in images])


class _Transform(nn.Module):
    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        rows, cols = (max(size[axis] for size in sizes) + 32 for axis in (0, 1))
        batch = [F.pad(image, (0, cols - image.shape[2], 0, rows - image.shape[1])) for image in images]
        return ImageList(torch.stack(batch), sizes), targets


class _Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.transform, self.backbone = _Transform(), backbone

    def forward(self, images: list[Tensor], targets: Any = None) -> Tensor:
        batch, targets = self.transform(images, targets)
        if targets is not None:
            raise RuntimeError("degenerate boxes")
        result: Tensor = self.backbone(batch.tensors)
        return result


def _images() -> list[Tensor]:
    return [image[:, : size[0], : size[1]] for image, size in zip(_batch(), SIZES, strict=True)]


def test_a_detector_tells_what_it_padded() -> None:
    detector = _Detector(_model())
    with torch.no_grad():
        plain = detector(_images())
        with padded(detector, SIZES):
            expected = detector(_images())
        handle = follow_padding(detector)
        for each in (detector, copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
            assert torch.equal(each(_images()), expected)
        assert not torch.equal(expected, plain)
        with ThreadPoolExecutor(2) as pool:
            run = torch.inference_mode()(detector)
            parts = [_images(), _images()[1:], _images()[:2]] * 3
            for images, got in zip(parts, pool.map(run, parts), strict=True):
                torch.testing.assert_close(got, run(images), rtol=0, atol=0)
        # The model alone is as ever, after an error too.
        with pytest.raises(RuntimeError, match="degenerate"):
            detector(_images(), [])
        assert not padding_module.in_use
        batch = detector.transform(_images())[0].tensors
        assert torch.equal(detector.backbone(batch), plain)
        handle.remove()
        handle.remove()
        assert torch.equal(detector(_images()), plain)
        with follow_padding(detector):
            assert torch.equal(detector(_images()), expected)
        assert torch.equal(detector(_images()), plain)
    assert not detector._forward_hooks and not detector.transform._forward_hooks


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="detector: got Sequential, which has no transform"):
        follow_padding(nn.Sequential(_model()))
    with pytest.raises(ValueError, match=r"model: got _Detector; expected a pyramid"):
        follow_padding(_Detector(nn.Linear(2, 2)))


class _WithFPN(nn.Module):
    """A pyramid of timm's form and torchvision's feature pyramid network, whose convolutions have biases."""

    def __init__(self, name: str, extra: Any = None, norm: Any = None) -> None:
        super().__init__()
        self.body = _model(name, features_only=True)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 32, extra, norm)
        self.out_channels = 32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(key), part) for key, part in enumerate(self.body(images))))
        return maps


def _vit() -> nn.Module:
    small: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    plain = timm.create_model("vit_small_patch16_224", dynamic_img_size=True, **small)
    return SimpleFeaturePyramid(scatter_routing(from_timm(plain)), out_channels=16)


def _anchors(levels: int) -> AnchorGenerator:
    return AnchorGenerator(tuple((16 * 2**level,) for level in range(levels)), ((0.5, 1.0),) * levels)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


def _detector(kind: str) -> Any:
    sizes: dict[str, Any] = {"min_size": 160, "max_size": 220, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    routed = "pvt_dge_s124_tiny_256"
    detector: Any
    if kind == "RetinaNet":
        body = _WithFPN(routed, LastLevelP6P7(32, 32), _group_norm)
        detector = RetinaNet(body, 4, anchor_generator=_anchors(6), score_thresh=0.0, detections_per_img=9, **sizes)
    elif kind == "FCOS":
        body = _WithFPN("dpvt_dge_s124_tiny_256")
        ones = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
        detector = FCOS(body, 4, anchor_generator=ones, score_thresh=0.0, detections_per_img=9, **sizes)
    else:
        body = _vit() if "ViT" in kind else _WithFPN(routed, LastLevelMaxPool())
        kinds: Any = FasterRCNN if "Faster" in kind else MaskRCNN
        options = {"rpn_anchor_generator": _anchors(4 if "ViT" in kind else 5), "rpn_post_nms_top_n_test": 30}
        detector = kinds(body, 4, box_score_thresh=0.0, box_detections_per_img=9, **options, **sizes)
    generator = torch.Generator().manual_seed(2)
    for key, parameter in detector.named_parameters():
        if ".body." not in key and "backbone.backbone" not in key:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return detector.eval()


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS", "FasterRCNN", "MaskRCNN", "MaskRCNN on a ViT"])
def test_detections_are_bit_for_bit_those_of_each_image_alone(kind: str) -> None:
    detector = _detector(kind)
    images = [torch.randn(3, *shape) for shape in [(160, 220), (220, 160), (100, 120), (210, 190)]]
    with torch.no_grad():
        plain = detector(images)
        handle = follow_padding(detector)
        alone = [detector([image])[0] for image in images]
        for each in (detector(images), copy.deepcopy(detector)(images=images), detector(images, None)):
            for found, own in zip(each, alone, strict=True):
                assert len(own["boxes"]) == 9
                assert found.keys() == own.keys()
                assert all(torch.equal(values, own[name]) for name, values in found.items())
        handle.remove()
        again = detector(images)
    for found, before, own in zip(again, plain, alone, strict=True):
        assert torch.equal(found["boxes"], before["boxes"])
        assert not torch.equal(found["boxes"], own["boxes"])
    assert not padding_module.in_use


def test_images_of_one_size_stay_together() -> None:
    detector = _detector("FCOS")
    follow_padding(detector)
    batches: list[tuple[int, ...]] = []
    detector.backbone.register_forward_pre_hook(lambda _, inputs: batches.append(tuple(inputs[0].shape)))
    images = [torch.randn(3, *shape) for shape in [(160, 220), (220, 160), (159, 220), (150, 200)]]
    assert same_sizes(detector, images) == [[0, 2, 3], [1]]
    with torch.no_grad(), collect_routings(detector) as collected:
        together = detector(images)
    assert batches == [(3, 3, 160, 224), (1, 3, 224, 160)]
    assert [forward[0].real_grids for forward in collected.records[0].forwards] == [((40, 56),) * 3, ((56, 40),)]
    with torch.no_grad():
        alone = [detector([image])[0] for image in images]
    for found, own in zip(together, alone, strict=True):
        assert torch.equal(found["labels"], own["labels"])
        torch.testing.assert_close(found["scores"], own["scores"], rtol=0, atol=1e-5)
        torch.testing.assert_close(found["boxes"], own["boxes"], rtol=1e-5, atol=1e-3)  # pixels, up to 220


def test_in_training_the_batch_stays_together() -> None:
    detector = _detector("FCOS").train()
    follow_padding(detector)
    batches: list[tuple[int, ...]] = []
    detector.backbone.register_forward_pre_hook(lambda _, inputs: batches.append(tuple(inputs[0].shape)))
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 90.0, 90.0]]), "labels": torch.tensor([1])}] * 2
    detector([torch.randn(3, 160, 220), torch.randn(3, 220, 160)], targets)
    assert batches == [(2, 3, 224, 224)]


def test_an_error_in_one_of_the_sizes_leaves_nothing_behind() -> None:
    detector = _detector("FCOS")
    follow_padding(detector)
    images = [torch.randn(3, 160, 220), torch.randn(3, 220, 160)]
    for wrong in ([images[0].int(), images[1]], [images[0], images[1].int()], [images[0][0], images[1]]):
        with torch.no_grad(), pytest.raises((TypeError, ValueError), match=r"Expected input|images is expected"):
            detector(wrong)
        assert not padding_module.in_use
        assert padding_module.settings.get() == ()
    with torch.no_grad():
        assert len(detector(images)) == 2
