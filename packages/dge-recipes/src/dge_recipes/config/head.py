"""The section of what stands on a backbone in detection and segmentation."""

from typing import Annotated, Literal

from pydantic import Field

from dge_recipes.sections import Count, Fraction, NonNegativeInt, Positive, Section

__all__ = ["DETECTORS", "SEGMENTERS", "HeadConfig"]

DETECTORS = ("retinanet", "faster_rcnn", "mask_rcnn")
SEGMENTERS = ("semantic_fpn", "upernet")


class HeadConfig(Section):
    """Neck and head of a detector (torchvision's) or a segmenter (segmentation_models_pytorch's)."""

    kind: Literal["retinanet", "faster_rcnn", "mask_rcnn", "semantic_fpn", "upernet"] | None = Field(
        default=None,
        description="detection: retinanet, faster_rcnn or mask_rcnn; segmentation: semantic_fpn or upernet",
    )
    channels: Count = Field(default=256, description="channels of the neck's maps and of the head")
    norm: Literal["none", "group"] = Field(
        default="none", description="norms in a detector's neck and in RetinaNet's towers: none, or group norm"
    )
    strides: tuple[Count, ...] | None = Field(
        default=None,
        strict=False,
        description="input pixels per cell of the maps that the head sees, finest first; null: the backbone's own, and "
        "in detection coarser ones above: on a pyramid 8 to 128 of retinanet, 4 to 64 of the others",
    )
    anchor_scale: Positive | None = Field(
        default=None,
        description="side of a map's smallest anchors over its stride; null: 4 of retinanet, 8 of the others",
    )
    short_side: Count | None = Field(
        default=None, description="detection: pixels that the short side is resized to; null: data.image_size"
    )
    short_sides: tuple[Count, ...] | None = Field(
        default=None,
        strict=False,
        description="detection: in training the short side of each image is resized to one of these, drawn anew every "
        "time; short_side, which evaluation takes, must be among them; null: always to short_side",
    )
    long_side: Count | None = Field(
        default=None, description="detection: most pixels of the long side then; null: data.image_size"
    )
    score_threshold: Fraction = Field(default=0.05, description="detection: detections below it are dropped")
    detections_per_image: Count = Field(default=100, description="detection: most detections of an image")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="semantic_fpn: share of channels dropped before the classifier in training"
    )
    frozen_stages: NonNegativeInt = Field(
        default=0,
        description="so many first stages of a pyramid, or blocks of a vision transformer with its embedding, get no "
        "gradient and run as in evaluation",
    )
