"""Models that merge tokens: what they compute, what they cost, and how they are kept."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from plain_models import PLAIN_MODELS, build_plain, partly_plain_images

from dge_models import count_macs, from_timm, merge_tokens, save_pretrained, set_budget, set_merge_counts
from dge_models.merge_tokens import merging_like, set_merge_ratio
from dge_models.merged import MergedVisionTransformer, MergedVisionTransformerDistilled


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("case", PLAIN_MODELS)
def test_at_ratio_one_nothing_changes(case: str, adaptive: bool) -> None:
    model, images = build_plain(case), partly_plain_images(case)
    merged = merge_tokens(model, 1.0, [images], adaptive)
    with torch.no_grad():
        torch.testing.assert_close(merged(images), model(images))
        torch.testing.assert_close(merged.forward_features(images), model.forward_features(images))
    assert merged.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("case", PLAIN_MODELS)
def test_the_ratio_is_met_and_the_grid_is_whole(case: str, adaptive: bool) -> None:
    model, images = build_plain(case), partly_plain_images(case)
    merged: Any = merge_tokens(model, 0.75, [images[:3], (images[3:], None)], adaptive)
    count = count_macs(merged, images)
    assert abs(float(count.total.mean()) / count.static_total - 0.75) <= 0.02
    assert count.static_total == count_macs(model, images).static_total
    with torch.no_grad():
        features = merged.forward_features(images)
        assert features.shape == model.forward_features(images).shape
        assert F.cosine_similarity(features, model.forward_features(images), dim=-1).mean() > 0.9
        last, maps = merged.forward_intermediates(images)
        torch.testing.assert_close(last, features)
        assert maps[-1].shape == model.forward_intermediates(images)[1][-1].shape
        torch.testing.assert_close(merged.forward_head(features), merged(images))
        alone = torch.cat([merged(image.unsqueeze(0)) for image in images])
        torch.testing.assert_close(alone, merged(images), atol=1e-5, rtol=1e-5)
    spread = count.total.max() - count.total.min()
    assert spread > 0 if adaptive else spread == 0


@pytest.mark.parametrize("adaptive", [True, False])
def test_constant_ways_compute_as_packed_ones_do(adaptive: bool) -> None:
    model, images = build_plain("average"), partly_plain_images("average")
    merged: Any = merge_tokens(model, 0.8, [images], adaptive)
    with torch.no_grad():
        expected = merged(images[:1])
    choices = [int(merging.attended - merging.left) for merging in merged.forward_merged(images[:1])[1]]
    other = merging_like(model, counts=choices)
    with torch.no_grad():
        torch.testing.assert_close(other(images[:1]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adaptive", [True, False])
def test_saved_copied_and_turned(adaptive: bool, tmp_path: Path) -> None:
    images = partly_plain_images("distilled")
    merged: Any = merge_tokens(build_plain("distilled"), 0.75, [images], adaptive)
    assert type(merged) is MergedVisionTransformerDistilled
    for clone in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        assert torch.equal(clone(images), merged(images))
    save_pretrained(merged, tmp_path / "saved", ratio=0.75)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(again(images), merged(images))
    setting = set_budget(again, 0.9, [images])
    assert abs(setting.ratio - 0.9) <= 0.02
    assert (setting.counts is None) is adaptive
    assert not torch.equal(again(images), merged(images))


def test_the_original_is_left_alone() -> None:
    model, images = build_plain(), partly_plain_images()
    before = model(images)
    merged = merge_tokens(model.train(), 0.7, [images])
    assert merged.training
    assert type(merged) is MergedVisionTransformer
    assert torch.equal(model.eval()(images), before)


def test_what_cannot_merge_is_refused() -> None:
    images = partly_plain_images()
    with pytest.raises(ValueError, match="model: got DGEVisionTransformer; expected timm's VisionTransformer"):
        merge_tokens(from_timm(build_plain()), 0.7, [images])
    with torch.device("meta"):
        rotary = timm.create_model("eva02_tiny_patch14_224")
    with pytest.raises(ValueError, match=r"got Eva; .* rotary"):
        merge_tokens(rotary, 0.7, [images])
    with pytest.raises(ValueError, match="merges already"):
        merge_tokens(merge_tokens(build_plain(), 0.7, [images]), 0.7, [images])
    with pytest.raises(ValueError, match="patch dropout"):
        merge_tokens(build_plain(patch_drop_rate=0.1), 0.7, [images])


def test_bad_settings_are_refused_and_nothing_is_lost() -> None:
    images, model = partly_plain_images(), build_plain()
    with pytest.raises(ValueError, match=r"ratio: got 1\.5"):
        merge_tokens(model, 1.5, [images])
    with pytest.raises(ValueError, match=r"loader: got None; expected images"):
        merge_tokens(model, 0.7)
    with pytest.raises(ValueError, match="loader: got no images"):
        merge_tokens(model, 0.7, [])
    with pytest.raises(TypeError, match="loader: got a batch of type dict"):
        merge_tokens(model, 0.7, [{}])
    for adaptive in (True, False):
        with pytest.raises(ValueError, match=r"ratio: got 0\.05; expected one from 0\.\d+, as much merged"):
            merge_tokens(model, 0.05, [images], adaptive)
    merged: Any = merge_tokens(model, 0.7, [images])
    settings = merged.merging_arguments()
    with pytest.raises(ValueError, match=r"ratio: got 0\.05"):
        set_merge_ratio(merged, 0.05, [images])
    assert merged.merging_arguments() == settings
    with pytest.raises(ValueError, match="counts: got 2; expected one per block, 4"):
        set_merge_counts(merged, [1, 2])
    with pytest.raises(ValueError, match=r"counts: got 60 for block 1; expected 0 to 37, half of the 74 left"):
        set_merge_counts(merged, [70, 60, 0, 0])
    with pytest.raises(ValueError, match="expected a model from merge_tokens"):
        set_merge_counts(model, [1, 1, 1, 1])
    with pytest.raises(ValueError, match="merge_limits: got none; expected one per block, 4"):
        merging_like(model, thresholds=[0.5] * 4)
    with pytest.raises(ValueError, match="attn_mask, is_causal"):
        merged(images, is_causal=True)
