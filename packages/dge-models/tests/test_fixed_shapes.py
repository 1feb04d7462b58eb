"""Counts that pictures decide, of models that route, merge, or do neither."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_models import build_plain, partly_plain_images
from small_models import Build

from dge_models import count_macs, fix_shapes, mean_counts, merge_tokens, set_budget, set_dynamic_queries, trace
from dge_models.fixed_shapes import FixedShapes


def test_routing(small: Build) -> None:
    model, images = small(), torch.randn(20, 3, 32, 32)
    loader = [(part, None) for part in images.split(10)]
    counts = mean_counts(model, loader)
    found = fix_shapes(model, loader)
    assert (found.kind, found.counts) == ("routing", counts)
    count = count_macs(model, images)
    torch.testing.assert_close(count.total / count.static_total, torch.full((20,), found.ratio, dtype=torch.float64))
    assert fix_shapes(model, loader) == found  # what is fixed stays
    other = fix_shapes(model, loader, 0.5)
    assert other.ratio < found.ratio
    set_dynamic_queries(model)
    assert other.counts == mean_counts(model, loader)
    set_budget(model, 0.5, loader)
    assert other.counts == mean_counts(model, loader)


def test_a_size_that_the_pictures_have(small: Build) -> None:
    model = small(dynamic_img_size=True)
    fix_shapes(model, [torch.randn(2, 3, 24, 32)])
    assert model(torch.randn(1, 3, 24, 32)).shape == (1, 7)


def test_merging() -> None:
    images = partly_plain_images()
    merged = merge_tokens(build_plain(), 0.7, [images])
    assert not merged.even
    means = trace(merged, images).groups.double().mean(1)
    found = fix_shapes(merged, list(images.split(2)))
    assert merged.even
    left = trace(merged, images).groups[:, 0]
    assert (left - means).abs().max() <= 1
    assert [sum(count) for count in found.counts] == [block.count for block in merged.blocks]
    count = count_macs(merged, images)
    assert found.ratio == pytest.approx(float(count.total[0]) / count.static_total)
    assert found.ratio == pytest.approx(0.7, abs=0.03)
    assert fix_shapes(merged, [images]) == found
    cheaper = fix_shapes(merged, [images], 0.6)
    assert cheaper.kind == "merging"
    assert cheaper.ratio == pytest.approx(0.6, abs=0.02)


def test_a_plain_model_has_ratio_one() -> None:
    plain, images = build_plain(), partly_plain_images()
    for ratio in (None, 1.0):
        assert fix_shapes(plain, [images], ratio) == FixedShapes("dense", (), 1.0)
    with pytest.raises(ValueError, match=r"got 0.5 for a VisionTransformer that neither routes nor merges; expected 1"):
        fix_shapes(plain, [images], 0.5)


def test_bad_input(small: Build) -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"ratio: got 1.5; expected a MAC ratio in \(0, 1\]"):
        fix_shapes(model, [images], 1.5)
    with pytest.raises(ValueError, match=r"ratio: got 0.1; expected at least 0\.\d+, the MAC ratio of the cheapest"):
        fix_shapes(model, [images], 0.1)
    with pytest.raises(ValueError, match="loader: got no images"):
        fix_shapes(model, [])
    iterator: Any = iter([images])
    with pytest.raises(TypeError, match="loader: got an iterator"):
        fix_shapes(model, iterator)
