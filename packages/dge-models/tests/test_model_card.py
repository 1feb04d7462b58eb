from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from small_models import SMALL, build_small

from dge_models import cheapest_ratio, save_pretrained, set_fixed_queries


def card(model: torch.nn.Module, folder: Path, **kwargs: float) -> str:
    save_pretrained(model, folder / "saved", **kwargs)  # type: ignore[arg-type]
    return (folder / "saved" / "README.md").read_text(encoding="utf-8")


def test_it_says_what_the_model_is_and_how_to_load_it(tmp_path: Path) -> None:
    model = build_small(layers=[0, 2])
    text = card(model, tmp_path, ratio=0.4321)
    cheapest = cheapest_ratio(model, model.forward_routed(torch.randn(1, 3, 32, 32))[1])
    for part in (
        "license: apache-2.0",
        "Registered name: `deit_dge_s124_tiny_patch16_256`",
        "region side): 4, 2, 1",
        "Routed blocks: 2 of 3",
        "MAC ratio, measured: 0.432",
        f"from {cheapest:.3f} to 1",
        "32 × 32 pixels; classes: 7",
        "local-dir:FOLDER",
    ):
        assert part in text
    setting = set_fixed_queries(model, 0.7)
    assert f"every image takes {setting.ratio:.3f}" in card(model, tmp_path)


def test_plain_models_have_no_routing_to_tell_of(tmp_path: Path) -> None:
    text = card(timm.create_model("deit_tiny_patch16_256", **SMALL), tmp_path)
    assert "# deit_tiny_patch16_256\n" in text
    assert "plits" not in text


def test_pyramids(tmp_path: Path) -> None:
    model = build_small("pvt_dge_s124_tiny_256")
    setting = set_fixed_queries(model, 0.5, image_size=(64, 96))
    assert f"every image takes {setting.ratio:.3f}" in card(model, tmp_path)
    assert "Routed blocks: 5 of 5" in card(model, tmp_path)
    assert setting.ratio == pytest.approx(0.5, abs=0.1)
