"""The layout of what images of several sizes give; the models that use it are tried in test_padding.py."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dge_models import SimpleFeaturePyramid, padded
from dge_models.canvas import StageTokens, at_own_sizes, forward_padded

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


class _Segmenter(nn.Module):
    """Convolutions with biases behind the finest map, and one class per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = _model()
        self.head = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1), nn.Upsample(scale_factor=4)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pyramid(images)["0"])
        return logits


def test_layers_behind_a_model_do_not_see_the_padding_either() -> None:
    model, sizes = _Segmenter().eval(), [(32, 64), (60, 30)]
    results, inside = [], []
    for canvas in ((64, 64), (96, 128)):
        batch = torch.zeros(2, 3, *canvas)
        for place, size in enumerate(sizes):
            batch[place, :, : size[0], : size[1]] = torch.linspace(-1, 1, size[0] * size[1]).view(size)
        with torch.no_grad():
            results.append(forward_padded(model, batch, sizes))
            with padded(model, sizes):
                inside.append(model(batch))
        assert results[-1].shape == (2, 2, *canvas)
        assert not results[-1][0, :, 32:].any()
    for place, (rows, cols) in enumerate(sizes):
        own, wider = (result[place, :, :rows, :cols] for result in results)
        assert own.any()
        torch.testing.assert_close(wider, own, rtol=0, atol=1e-5)
    assert not torch.allclose(inside[0][0, :, :32, :64], inside[1][0, :, :32, :64], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="image_sizes: got 1 sizes; expected one per image of the batch, 2"):
        forward_padded(model, torch.zeros(2, 3, 64, 64), sizes[:1])
