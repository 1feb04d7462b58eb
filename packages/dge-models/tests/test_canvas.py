"""The layout of what images of several sizes give; the models that use it are tried in test_padding.py."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from dge_models import SimpleFeaturePyramid, padded
from dge_models.canvas import StageTokens, at_own_sizes

SIZES = [(32, 64), (64, 32), (32, 64)]


def _model() -> SimpleFeaturePyramid:
    small = {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    return SimpleFeaturePyramid(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **small), 8)


def _cells(images: Tensor) -> dict[str, Any]:
    """One cell for 16 x 16 pixels: as a map, as tokens behind a prefix token, and what is of no place."""
    map_ = images[:, :, ::16, ::16]
    tokens = torch.cat([torch.ones(len(images), 1, 3), map_.flatten(2).transpose(1, 2)], dim=1)
    return {"map": map_, "stage": StageTokens(tokens, (map_.shape[2], map_.shape[3]), 1), "means": map_.mean((2, 3))}


def test_images_of_one_size_are_run_together_and_laid_out_in_their_order() -> None:
    model, images, seen = _model(), torch.randn(3, 3, 64, 64), []

    def run(group: Tensor) -> dict[str, Any]:
        seen.append(tuple(group.shape))
        return _cells(group)

    with padded(model, SIZES):
        got = at_own_sizes(model, run, images)
    assert sorted(seen) == [(1, 3, 64, 32), (2, 3, 32, 64)]
    for index, (height, width) in enumerate(SIZES):
        own = _cells(images[index : index + 1, :, :height, :width])
        rows, cols = height // 16, width // 16
        assert torch.equal(got["map"][index, :, :rows, :cols], own["map"][0])
        assert got["map"][index].count_nonzero() == own["map"].count_nonzero()
        grid = got["stage"].tokens[index, 1:].unflatten(0, got["stage"].grid)
        assert torch.equal(grid[:rows, :cols].flatten(0, 1), own["stage"].tokens[0, 1:])
        assert torch.equal(got["stage"].tokens[index, 0], torch.ones(3))
        assert torch.equal(got["means"][index], own["means"][0])


def test_outside_it_is_called_once_with_the_batch() -> None:
    images = torch.randn(2, 3, 64, 64)
    assert at_own_sizes(_model(), lambda batch: batch, images) is images


@pytest.mark.parametrize(("sizes", "words"), [([(32, 32)], "1"), ([(32, 32), (96, 32)], "96")])
def test_sizes_that_do_not_fit_the_batch(sizes: list[tuple[int, int]], words: str) -> None:
    model = _model()
    with padded(model, sizes), pytest.raises(ValueError, match=f"image_sizes: got .*{words}"):
        at_own_sizes(model, _cells, torch.randn(2, 3, 64, 64))
