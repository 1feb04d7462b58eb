"""What a user may call a model, and what is said of the rest."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_models import save_model, small_vit

import dge_models
from dge_recipes.compress.source import load_dense
from dge_recipes.config import load_config
from dge_recipes.errors import UserError
from dge_recipes.train import train


def test_a_saved_model_brings_its_weights_and_its_preprocessing(tmp_path: Path) -> None:
    model = small_vit()
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), crop_pct=0.8)  # type: ignore[operator, union-attr]
    dge_models.save_pretrained(model, tmp_path / "m")
    dense = load_dense(f"local-dir:{tmp_path / 'm'}")
    assert load_dense(str(tmp_path / "m")).view == dense.view
    assert (dense.view["image_size"], dense.view["mean"], dense.view["crop_pct"]) == (64, (0.1, 0.2, 0.3), 0.8)
    assert torch.equal(dense.model.head.weight, model.head.weight)  # type: ignore[arg-type, union-attr]
    assert not dense.model.training


def test_another_size(tmp_path: Path) -> None:
    source = save_model(tmp_path / "m")
    dense = load_dense(source, 96)
    assert dense.view["image_size"] == 96
    assert dense.model.pos_embed.shape[1] == 1 + 12 * 12  # type: ignore[index, union-attr]
    with pytest.raises(UserError, match=r"--image-size 4: model local-dir:\S+ cannot be set to it"):
        load_dense(source, 4)


def test_a_run(tmp_path: Path, small: Sequence[str]) -> None:
    size = ("data.name=shapes", "data.image_size=32", "data.num_images=8", "data.held_out_images=4", "data.workers=0")
    settings = [each for each in small if not each.startswith("data.")]
    overrides = [*settings, *size, f"output.dir={tmp_path / 'run'}", "train.epochs=1", "train.batch_size=4"]
    train(load_config("shapes_dense", overrides))
    dense = load_dense(str(tmp_path / "run"))
    assert dense.view == {"image_size": 32, "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def test_what_is_no_dense_model(tmp_path: Path, small: Sequence[str]) -> None:
    with pytest.raises(UserError, match=r"vit_tinny does not exist, and no model of timm is called so; expected"):
        load_dense("vit_tinny")
    with pytest.raises(UserError, match=r"model vit_tiny_patch16_224.none cannot be created"):
        load_dense("vit_tiny_patch16_224.none")
    with pytest.raises(UserError, match=r"model local-dir:\S+gone cannot be created"):
        load_dense(f"local-dir:{tmp_path / 'gone'}")
    with pytest.raises(UserError, match=r"is no saved model, and of no run that recorded its config; expected"):
        load_dense(str(tmp_path))
    routed = dge_models.from_timm(small_vit(), (2, 1))
    dge_models.save_pretrained(routed, tmp_path / "routed")
    with pytest.raises(UserError, match=r"routes its queries already; expected a dense one \(dge-eval --budget"):
        load_dense(f"local-dir:{tmp_path / 'routed'}")
    train(load_config("digits_dense", [*small, f"output.dir={tmp_path / 'run'}", "train.epochs=1"]))
    with pytest.raises(UserError, match=r"cannot take colour pictures of 32 x 32 pixels"):
        load_dense(str(tmp_path / "run"))


def test_a_name_without_weights() -> None:
    with pytest.raises(UserError, match=r"the weights of model \S+ are not to be had: .*local-dir:FOLDER reads"):
        load_dense("deit_tiny_patch16_256")
