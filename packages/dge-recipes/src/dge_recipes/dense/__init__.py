"""Detection and segmentation: torchvision's detectors and segmentation_models_pytorch's decoders on our backbones."""

from dge_recipes.dense.backbones import create_backbone, routed_backbone
from dge_recipes.dense.detectors import build_detector
from dge_recipes.dense.losses import DetectionLosses, SegmentationLosses
from dge_recipes.dense.macs import PartMacs, forward_counted
from dge_recipes.dense.segmenters import Segmenter, build_segmenter, likeliest

__all__ = [
    "DetectionLosses",
    "PartMacs",
    "SegmentationLosses",
    "Segmenter",
    "build_detector",
    "build_segmenter",
    "create_backbone",
    "forward_counted",
    "likeliest",
    "routed_backbone",
]
