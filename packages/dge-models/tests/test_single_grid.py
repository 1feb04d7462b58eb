"""What transformers on one token grid share."""

from __future__ import annotations

import pytest
import torch
from plain_models import build_plain, partly_plain_images
from timm.models._features_fx import create_feature_extractor

from dge_models import from_timm
from dge_models.single_grid import image_size, intermediates_of, refuse_masks, whole_patches


def test_images_have_four_dimensions_and_a_patch() -> None:
    assert image_size(torch.zeros(1, 3, 5, 7)) == (5, 7)
    with pytest.raises(ValueError, match=r"images: got shape \(3, 5, 7\); expected \[B, C, H, W\]"):
        image_size(torch.zeros(3, 5, 7))
    assert whole_patches((1, 2), (8, 16), (8, 8)) == (1, 2)
    with pytest.raises(ValueError, match=r"images: got 5 × 16 pixels; expected at least one patch of \(8, 8\)"):
        whole_patches((0, 2), (5, 16), (8, 8))


def test_masks_are_refused() -> None:
    refuse_masks(None, False)
    for mask, causal in ((torch.ones(1), False), (None, True)):
        with pytest.raises(ValueError, match="attn_mask, is_causal: got a mask"):
            refuse_masks(mask, causal)


def test_features_come_in_each_form() -> None:
    maps, prefix = [torch.zeros(1)], [torch.ones(1)]
    assert intermediates_of(maps, None, lambda: maps[0], True, False) is maps
    assert intermediates_of(maps, prefix, lambda: maps[0], True, False) == [(maps[0], prefix[0])]
    assert intermediates_of(maps, None, lambda: maps[0], False, False) == (maps[0], maps)
    named = intermediates_of(maps, prefix, lambda: maps[0], False, True)
    assert set(named) == {"image_intermediates", "image_intermediates_prefix", "image_features"}


def test_checks_do_not_stop_timms_graph_extractor() -> None:
    model = from_timm(build_plain())
    images = partly_plain_images(batch=2)
    with torch.no_grad():
        tokens = create_feature_extractor(model, ["blocks.1"])(images)["blocks.1"]
        expected = model.forward_intermediates(images, [1], intermediates_only=True, output_fmt="NLC")[0]
    torch.testing.assert_close(tokens[:, 1:], expected)
