"""torchvision's detectors on our backbones."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from dge_models import SimpleFeaturePyramid, follow_padding
from dge_models.padding import FollowsPadding
from dge_recipes.config.head import DETECTORS, HeadConfig
from dge_recipes.dense.backbones import Maps, build_maps, own_strides
from dge_recipes.errors import UserError

__all__ = ["MOST_PROPOSALS", "ExtendedPyramid", "FPNBackbone", "build_detector"]

MOST_PROPOSALS = 1000
"""Proposals of an image that a two-stage detector looks at in evaluation, at most (torchvision's own number)."""

_RATIOS = (0.5, 1.0, 2.0)
_NORM_GROUPS = 32


class FPNBackbone(nn.Module):
    """A pyramid's maps through torchvision's FeaturePyramidNetwork.

    Args:
        body: the pyramid.
        fpn: torchvision's, for the body's channels.
        out_channels: of every map.

    Attributes:
        out_channels: as given; torchvision's detectors read it.
    """

    def __init__(self, body: Maps, fpn: FeaturePyramidNetwork, out_channels: int) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps float [B, out_channels, h, w] of images [B, 3, H, W], by "0", "1", ..., finest first."""
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(i), each) for i, each in enumerate(self.body(images))))
        return maps


class ExtendedPyramid(nn.Module):
    """A simple feature pyramid with coarser maps above it.

    Args:
        body: the pyramid.
        extra: torchvision's, makes the coarser maps from the coarsest one.

    Attributes:
        out_channels: of every map.
    """

    def __init__(self, body: SimpleFeaturePyramid, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.body, self.extra, self.out_channels = body, extra, body.out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps float [B, out_channels, h, w] of images [B, 3, H, W], finest first."""
        named = self.body(images)
        maps, names = self.extra(list(named.values()), list(named.values()), list(named))
        return OrderedDict(zip(names, maps, strict=True))


def build_detector(backbone: nn.Module, head: HeadConfig, num_classes: int, image_size: int | None = None) -> nn.Module:
    """A detector of torchvision.

    Images come normalised and in their own sizes: the detector resizes them, pads them to one batch, and gives boxes
    in the pixels of what it was given. Its labels start at 1, as torchvision has it. With a backbone of dge_models,
    what an image gets in evaluation does not depend on the others of its batch (``dge_models.follow_padding``).

    Args:
        backbone: from :func:`~dge_recipes.dense.backbones.create_backbone`; it becomes part of the detector. A pyramid
            gets a FeaturePyramidNetwork, a vision transformer a simple feature pyramid. Above the last stage, or two
            patches, comes what the detector's authors put there: two convolutions for RetinaNet (P6 and P7), a
            subsampled map for the others.
        head: the ``head`` section, of a detector's kind.
        num_classes: kinds of objects, background not among them.
        image_size: what ``head.short_side`` and ``head.long_side`` are where they are None.

    Returns:
        ``RetinaNet``, ``FasterRCNN`` or ``MaskRCNN``, in training mode.

    Raises:
        UserError: the head is none of a detector, or backbone and head do not go together.
    """
    if head.kind not in DETECTORS:
        raise UserError(f"head.kind: got {head.kind}, expected one of {', '.join(DETECTORS)} for detection")
    retinanet = head.kind == "retinanet"
    strides = head.strides or _usual_strides(backbone, retinanet=retinanet)
    body, levels = _with_neck(backbone, head, strides, retinanet=retinanet)
    scale = head.anchor_scale or (4.0 if retinanet else 8.0)
    octaves = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)) if retinanet else (1.0,)
    sizes = tuple(tuple(round(stride * scale * octave) for octave in octaves) for stride in strides)
    anchors = AnchorGenerator(sizes, (_RATIOS,) * len(sizes))
    resizing: dict[str, Any] = {
        "min_size": _short_sides(head, image_size),
        "max_size": _side(head.long_side, image_size, "long_side"),
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }
    if retinanet:
        towers = RetinaNetHead(
            head.channels, anchors.num_anchors_per_location()[0], num_classes + 1, norm_layer=_norm(head)
        )
        detector = RetinaNet(
            body,
            num_classes + 1,
            anchor_generator=anchors,
            head=towers,
            score_thresh=head.score_threshold,
            detections_per_img=head.detections_per_image,
            **resizing,
        )
    else:
        detector = _two_stages(body, head, num_classes, anchors, levels, resizing)
    if any(isinstance(part, FollowsPadding) for part in detector.modules()):
        follow_padding(detector)
    return detector


def _two_stages(
    body: nn.Module, head: HeadConfig, num_classes: int, anchors: AnchorGenerator, levels: int, resizing: dict[str, Any]
) -> nn.Module:
    names = [str(level) for level in range(levels)]
    pool = MultiScaleRoIAlign(featmap_names=names, output_size=7, sampling_ratio=2)
    # 1024 of 256 channels, as the authors have it.
    width = 4 * head.channels
    options: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "rpn_post_nms_top_n_test": MOST_PROPOSALS,
        "box_roi_pool": pool,
        "box_head": TwoMLPHead(head.channels * 7**2, width),
        "box_score_thresh": head.score_threshold,
        "box_detections_per_img": head.detections_per_image,
        **resizing,
    }
    predictor = FastRCNNPredictor(width, num_classes + 1)
    if head.kind == "faster_rcnn":
        return FasterRCNN(body, None, box_predictor=predictor, **options)
    return MaskRCNN(
        body,
        None,
        box_predictor=predictor,
        mask_roi_pool=MultiScaleRoIAlign(featmap_names=names, output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(head.channels, (head.channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(head.channels, head.channels, num_classes + 1),
        **options,
    )


def _usual_strides(backbone: nn.Module, *, retinanet: bool) -> tuple[int, ...]:
    """The backbone's own and what comes above: 8 to 128 for RetinaNet, 4 to 64 for the others, where its first is 4."""
    own = own_strides(backbone)
    used, extra = (own[1:], 2) if retinanet else (own, 1)
    return (*used, *(own[-1] * 2 ** (index + 1) for index in range(extra))) if own else ()


def _with_neck(
    backbone: nn.Module, head: HeadConfig, strides: Sequence[int], *, retinanet: bool
) -> tuple[nn.Module, int]:
    """The backbone with its neck, and how many of its maps are no extra ones."""
    last = max(own_strides(backbone), default=0)
    own = [stride for stride in strides if stride <= last]
    wanted = len(strides) - len(own)
    allowed = (0, 2) if retinanet else (0, 1)
    if wanted not in allowed:
        raise UserError(
            f"head.strides: got {list(strides)}, {wanted} of them above the backbone's last, {last}; expected "
            f"{allowed[0]} or {allowed[1]} for {head.kind}"
        )
    maps: Any = build_maps(backbone, own, head.channels, head.frozen_stages)
    extra: ExtraFPNBlock | None = None
    if wanted:
        extra = LastLevelP6P7(maps.channels[-1], head.channels) if retinanet else LastLevelMaxPool()
    if isinstance(maps, SimpleFeaturePyramid):
        return (maps if extra is None else ExtendedPyramid(maps, extra)), len(own)
    fpn = FeaturePyramidNetwork(maps.channels, head.channels, extra, norm_layer=_norm(head))
    return FPNBackbone(maps, fpn, head.channels), len(own)


def _norm(head: HeadConfig) -> Callable[..., nn.Module] | None:
    if head.norm == "none":
        return None
    groups = min(_NORM_GROUPS, head.channels)
    if head.channels % groups:
        raise UserError(f"head.channels: got {head.channels}, expected a multiple of {groups} with head.norm=group")
    return partial(nn.GroupNorm, groups)


def _short_sides(head: HeadConfig, image_size: int | None) -> tuple[int, ...]:
    """Those of training; evaluation takes the last."""
    own = _side(head.short_side, image_size, "short_side")
    sides = head.short_sides or (own,)
    if own not in sides:
        raise UserError(f"head.short_sides: got {list(sides)}, expected head.short_side={own} among them")
    return (*(side for side in sides if side != own), own)


def _side(side: int | None, image_size: int | None, key: str) -> int:
    if side is None and image_size is None:
        raise UserError(f"head.{key}: got null, expected pixels, for the data have no image_size")
    return int(side or image_size or 0)
