"""transformers' wrapper around timm loads a saved model, and what it saves itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from dge_models import from_timm, save_pretrained, set_fixed_queries
from dge_models.routed import routed_blocks

transformers = pytest.importorskip("transformers")


def _converted() -> Any:
    plain = timm.create_model("deit3_small_patch16_224", img_size=64, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    model = from_timm(plain, splits=(2, 1), layers=[0, 2]).eval()
    for block in routed_blocks(model):
        torch.nn.init.normal_(block.router.gate.weight, std=4.0)
    return model


@pytest.mark.parametrize("fixed", [False, True])
def test_images_are_classified_as_before(tmp_path: Path, fixed: bool) -> None:
    model, images = _converted(), torch.randn(2, 3, 64, 64)
    if fixed:
        set_fixed_queries(model, 0.9)
    save_pretrained(model, tmp_path / "saved", label_names=["ant", "bee", "cat", "dog", "eel"])
    wrapped = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(wrapped(pixel_values=images).logits, expected)
    assert wrapped.config.id2label[4] == "eel"
    wrapped.save_pretrained(tmp_path / "again")
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images).logits, expected)


def test_features_are_as_before(tmp_path: Path) -> None:
    model, images = _converted(), torch.randn(2, 3, 64, 64)
    save_pretrained(model, tmp_path / "saved")
    wrapped = transformers.TimmWrapperModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(wrapped(pixel_values=images).last_hidden_state, model.forward_features(images))
