"""What ``dge-eval`` is given: a run, a file that names its model, or a model of timm; and the published rows."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from dge_recipes.config import ImageFolderData, load_config
from dge_recipes.errors import UserError
from dge_recipes.evaluation import Row, markdown_table
from dge_recipes.evaluation.table import published_row
from dge_recipes.evaluation.target import find_target
from dge_recipes.models import build_model


def test_the_authors_file_names_its_model(tmp_path: Path) -> None:
    path = tmp_path / "dge.pth"
    weights = {"head.weight": torch.zeros(1)}
    torch.save({"model": weights, "args": argparse.Namespace(model="deit_dge_s124_small_patch16_256")}, path)
    target = find_target(str(path), None, ["data.root=/x"])
    assert (target.config.model.name, target.weights) == ("deit_dge_s124_small_patch16_256", str(path))
    assert isinstance(target.config.data, ImageFolderData)
    assert target.config.data.root == "/x"
    assert find_target(str(path), "deit_tiny_256", []).config.model.name == "deit_tiny_patch16_256"
    torch.save({"model": weights, "args": argparse.Namespace(model="other")}, path)
    with pytest.raises(UserError, match="say which recipe"):
        find_target(str(path), None, [])


def test_a_timm_model_brings_its_preprocessing_and_weights(tmp_path: Path) -> None:
    config = find_target("vit_tiny_patch16_224", None, ["data.crop_pct=0.8"]).config
    assert isinstance(config.data, ImageFolderData)
    assert (config.data.image_size, config.data.mean, config.data.crop_pct) == (224, (0.5, 0.5, 0.5), 0.8)
    assert config.model.kwargs == {"pretrained": True}
    with pytest.raises(UserError, match="no model of timm is called so"):
        find_target("vit_tinny", None, [])
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    text = (
        '{"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": {"img_size": 32, "depth": 1},'
        ' "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "num_classes": 3}}'
    )
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = find_target(f"local-dir:{tmp_path}", None, []).config
    assert find_target(str(tmp_path), None, []).config == config
    assert isinstance(config.data, ImageFolderData)
    assert (config.data.image_size, config.data.mean) == (32, (0.1, 0.2, 0.3))
    loaded = build_model(config.model, 3, (3, 32, 32))
    assert torch.equal(loaded.head.weight, model.head.weight)  # type: ignore[arg-type, union-attr]


def test_published_rows_stand_below_what_can_be_compared() -> None:
    published = published_row(load_config("deit_dge_small_256"), 1000)
    assert published is not None
    assert (published.acc1, published.acc5, published.macs) == (80.1, 95.0, 3.5e9)
    lines = markdown_table([Row("x", 1.0, 2.0, 3.6e9, None, published)]).splitlines()
    assert lines[3] == "| published | 80.1 | 95.0 | 3.5 G | |"
    assert published_row(load_config("deit_dge_small_256"), 100) is None
    assert published_row(load_config("deit_dge_small_256", ["data.image_size=224"]), 1000) is None
    assert published_row(load_config("deit_dge_base_256"), 1000) is None
    assert published_row(load_config("digits"), 1000) is None
