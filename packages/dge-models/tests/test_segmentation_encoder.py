"""Alone; under segmentation_models_pytorch it is tried in companions/test_dense_prediction.py."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from dge_models import SegmentationEncoder, SimpleFeaturePyramid


def _pyramid(**kwargs: Any) -> SimpleFeaturePyramid:
    small = {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **small)
    return SimpleFeaturePyramid(model, out_channels=8, **kwargs).eval()


def test_maps_are_the_pyramids_behind_the_image_and_an_empty_map() -> None:
    pyramid, images = _pyramid(), torch.randn(2, 3, 64, 96)
    encoder = SegmentationEncoder(pyramid)
    with torch.no_grad():
        image, empty, *maps = encoder(images)
        expected = list(pyramid(images).values())
    assert image is images
    assert tuple(empty.shape) == (2, 0, 32, 48)
    assert encoder.out_channels == [3, 0, 8, 8, 8, 8]
    for got, own in zip(maps, expected, strict=True):
        assert torch.equal(got, own)


@pytest.mark.parametrize("depth", [2, 4])
def test_fewer_maps(depth: int) -> None:
    encoder = SegmentationEncoder(_pyramid(), depth)
    with torch.no_grad():
        maps = encoder(torch.randn(1, 3, 64, 64))
    assert [part.shape[1] for part in maps] == encoder.out_channels
    assert maps[-1].shape[-1] == 64 // encoder.output_stride


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^pyramid: got maps of strides .*; expected \(4, 8, 16, 32\)"):
        SegmentationEncoder(_pyramid(scales=(2, 1)))
    with pytest.raises(ValueError, match="depth: got 6; expected 2 to 5"):
        SegmentationEncoder(_pyramid(), 6)
    with pytest.raises(ValueError, match="output_stride: got 16; expected 32"):
        SegmentationEncoder(_pyramid(), output_stride=16)
    with pytest.raises(ValueError, match="in_channels: got 4; expected 3"):
        SegmentationEncoder(_pyramid()).set_in_channels(4)
