from __future__ import annotations

import pytest
import timm
import torch
from small_models import SMALL, Build

from dge_models import count_macs, trace


def test_a_trace_is_what_the_model_does_in_evaluation(small: Build) -> None:
    model, images = small(img_size=(28, 32)).train(), torch.randn(4, 3, 28, 32)
    result = trace(model, images)
    assert model.training
    logits, routings = model.eval().forward_routed(images)
    torch.testing.assert_close(result.logits, logits, atol=1e-5, rtol=0)
    assert not result.logits.requires_grad
    assert [part.dtype for part in result.granularity] == [torch.uint8] * 3
    assert all(torch.equal(a, b.choice) for a, b in zip(result.granularity, routings, strict=True))
    assert torch.equal(result.queries, torch.stack([routing.queries.long() for routing in routings]))
    count = count_macs(model, images)
    assert torch.equal(result.macs, count.total)
    assert result.static_macs == count.static_total
    assert result.grid == (7, 8)


def test_a_pyramids_trace_has_a_grid_per_layer(small: Build) -> None:
    model, images = small("pvt_dge_s124_tiny_256"), torch.randn(2, 3, 64, 96)
    result = trace(model, images)
    assert result.grids == [(16, 24), (8, 12), (8, 12), (4, 6), (2, 3)]
    assert result.grid == (16, 24)
    assert [part.shape for part in result.granularity] == [(2, 4, 6), (2, 2, 3), (2, 2, 3), (2, 1, 2), (2, 1, 1)]
    assert result.queries.shape == (5, 2)
    assert torch.equal(result.macs, count_macs(model, images).total)


def test_an_empty_batch(small: Build) -> None:
    result = trace(small(), torch.randn(0, 3, 32, 32))
    assert result.queries.shape == (3, 0)
    assert result.macs.shape == (0,)


def test_models_without_routers_are_refused(small: Build) -> None:
    with pytest.raises(ValueError, match="got VisionTransformer; expected a model with routed blocks"):
        trace(timm.create_model("deit_tiny_patch16_256", **SMALL), torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="none of its blocks is routed"):
        trace(small(layers=[]), torch.randn(1, 3, 32, 32))
