"""Multiply-accumulates of a detector's or segmenter's backbone, neck and head."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import RetinaNet

import dge_models
from dge_models import Routing, SimpleFeaturePyramid
from dge_models.detector_padding import same_sizes
from dge_recipes.dense.backbones import routed_backbone
from dge_recipes.dense.detectors import MOST_PROPOSALS, ExtendedPyramid, FPNBackbone
from dge_recipes.dense.segmenters import Segmenter

__all__ = ["PartMacs", "forward_counted"]

_SIZES = 256  # input sizes of a network whose neck and head are remembered
_counted: "WeakKeyDictionary[nn.Module, OrderedDict[tuple[int, int], tuple[float, float]]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class PartMacs:
    """Multiply-accumulates per image of a batch of B.

    Images of several sizes are run one size after the other, as detectors do it that follow padding.

    Attributes:
        backbone: float64 [B], as the images were routed; the parts of the network that ``dge_models`` counts.
        static_backbone: with every query computed; the mean over the images, where their sizes differ.
        neck: between the backbone's tokens or stages and the head: FPN, the levels of a simple feature pyramid,
            and a segmenter's decoder. Where sizes differ, the mean over the images, as of the head.
        head: what finds classes and boxes. Of a two-stage detector with as many proposals as it looks at and as many
            detections as it gives at most, whatever the image: an upper bound.
    """

    backbone: Tensor
    static_backbone: float
    neck: float
    head: float

    @property
    def ratio(self) -> Tensor:
        """float64 [B], the backbone's MACs over those with every query computed (the mean of these)."""
        return self.backbone / self.static_backbone


def forward_counted(network: nn.Module, images: Any) -> tuple[Any, PartMacs]:
    """Run a detector or segmenter in evaluation and count what it spends.

    Args:
        network: from ``build_detector`` or ``build_segmenter``, in evaluation mode.
        images: what it takes: a list of images [3, H, W], or a batch [B, 3, H, W].

    Returns:
        What the network returns, and the counts, on the CPU.
    """
    if isinstance(network, Segmenter):
        return _forward_counted(network, images)
    outputs, counts = list[Any](images), list[tuple[int, PartMacs]]()
    backbone = torch.empty(len(outputs), dtype=torch.float64)
    for own in same_sizes(network, images):
        found, macs = _forward_counted(network, [images[place] for place in own])
        for place, each in zip(own, found, strict=True):
            outputs[place] = each
        backbone[own] = macs.backbone
        counts.append((len(own), macs))
    return outputs, PartMacs(backbone, *_means(counts))


def _means(counts: Sequence[tuple[int, PartMacs]]) -> tuple[float, float, float]:
    """Of a static backbone, neck and head over groups of so many images."""
    if len(counts) == 1:
        return counts[0][1].static_backbone, counts[0][1].neck, counts[0][1].head
    total = sum(count for count, _ in counts)
    sums = [[count * part for part in (macs.static_backbone, macs.neck, macs.head)] for count, macs in counts]
    static, neck, head = (sum(parts) / total for parts in zip(*sums, strict=True))
    return static, neck, head


def _forward_counted(network: nn.Module, images: Any) -> tuple[Any, PartMacs]:
    """The same of images that the network runs together."""
    shapes: list[torch.Size] = []
    own_sizes: list[list[tuple[int, int]]] = []
    backbone: nn.Module = network.encoder if isinstance(network, Segmenter) else network.backbone  # type: ignore[assignment]
    handles = [backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))]
    if not isinstance(network, Segmenter):
        transform: nn.Module = network.transform  # type: ignore[assignment]
        handles.append(transform.register_forward_hook(lambda _, __, out: own_sizes.append(out[0].image_sizes)))
    routings: Sequence[Routing] = ()
    try:
        if routed_backbone(network) is None:
            output = network(images)
        else:
            with dge_models.collect_routings(network) as collected:
                output = network(images)
            routings = collected.routings
    finally:
        for handle in handles:
            handle.remove()
    shape = shapes[0]
    if routings:
        counts = dge_models.count_from_routings(collected.model, routings, routings[0].grid, shape[0])
        spent, static = counts.total, counts.static_total
    else:
        spent = _unrouted(network, shape, own_sizes[0] if own_sizes else [(shape[2], shape[3])] * shape[0])
        static = float(spent.mean())
    neck, head = _neck_and_head(network, (shape[2], shape[3]))
    return output, PartMacs(spent, static, neck, head)


def _unrouted(network: nn.Module, shape: torch.Size, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """float64 [B], what a backbone without routers spends on images of these sizes."""
    follower: Any = next(part for part in network.modules() if hasattr(part, "size_multiple"))
    multiple = follower.size_multiple()
    run = [
        tuple(min(-(-side // each) * each, most) for side, each, most in zip(size, multiple, shape[2:], strict=True))
        for size in sizes
    ]
    known = {
        size: dge_models.count_macs(network, torch.empty(1, shape[1], *size, device="meta")).static_total
        for size in set(run)
    }
    return torch.tensor([known[size] for size in run], dtype=torch.float64)


def _neck_and_head(network: nn.Module, size: tuple[int, int]) -> tuple[float, float]:
    """Of one image of this many pixels; counted once per size."""
    known = _counted.setdefault(network, OrderedDict())
    if size not in known:
        known[size] = _count_neck_and_head(network, size)
        if len(known) > _SIZES:
            known.popitem(last=False)
    return known[size]


def _count_neck_and_head(network: Any, size: tuple[int, int]) -> tuple[float, float]:
    if isinstance(network, Segmenter):
        maps, levels = _maps(network.encoder.model, size)
        image, half = (torch.empty(1, channels, *size, device="meta") for channels in (3, 0))
        decoded, decoder = _run(network.decoder, [image, half, *maps])
        return levels + decoder, _run(network.segmentation_head, decoded)[1]
    maps, neck = _maps(network.backbone, size)
    if isinstance(network, RetinaNet):
        return neck, _run(network.head, maps)[1]
    (logits, _), head = _run(network.rpn.head, maps)
    roi: Any = network.roi_heads
    proposals = min(MOST_PROPOSALS, sum(each[0].numel() for each in logits))
    found = min(proposals * (roi.box_predictor.cls_score.out_features - 1), roi.detections_per_img)
    for pool, count, layers in (
        (roi.box_roi_pool, proposals, (roi.box_head, roi.box_predictor)),
        (roi.mask_roi_pool, found, (roi.mask_head, roi.mask_predictor)),
    ):
        if pool is not None:
            out: Any = torch.empty(count, network.backbone.out_channels, *pool.output_size, device="meta")
            for layer in layers:
                out, macs = _run(layer, out)
                head += macs
    return neck, head


def _maps(backbone: Any, size: tuple[int, int]) -> tuple[list[Tensor], float]:
    """Maps without values of one image, and the MACs from the backbone's tokens or stages to them."""
    if isinstance(backbone, ExtendedPyramid):
        maps, neck = _maps(backbone.body, size)
        (maps, _), above = _run(backbone.extra, list(maps), list(maps), [str(index) for index in range(len(maps))])
        return maps, neck + above
    if isinstance(backbone, SimpleFeaturePyramid):
        sides = backbone.backbone.patch_embed.patch_size
        rows, cols = (-(-length // side) for length, side in zip(size, sides, strict=True))
        tokens = torch.empty(1, backbone.backbone.embed_dim, rows, cols, device="meta")
        made = [_run(level, tokens) for level in backbone.levels]
        return [each for each, _ in made], sum(macs for _, macs in made)
    body = backbone.body if isinstance(backbone, FPNBackbone) else backbone
    maps = [
        torch.empty(1, channels, size[0] // stride, size[1] // stride, device="meta")
        for channels, stride in zip(body.channels, body.strides, strict=True)
    ]
    if not isinstance(backbone, FPNBackbone):
        return maps, 0.0
    named, macs = _run(backbone.fpn, OrderedDict((str(index), each) for index, each in enumerate(maps)))
    return list(named.values()), macs


def _run(module: nn.Module, *inputs: Any) -> tuple[Any, float]:
    """What a module makes of tensors without values, and its multiply-accumulates."""
    state = {name: torch.empty_like(each, device="meta") for name, each in _state(module)}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = torch.func.functional_call(module, state, inputs)
    return output, counter.get_total_flops() / 2


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
