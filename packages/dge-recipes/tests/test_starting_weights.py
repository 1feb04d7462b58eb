"""Weights to start or to learn from: their head is kept for the classes that it knows, by name."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from folder_runs import folder_config, write_lab
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dge_recipes.checkpoints.stored_classes import stored_classes, weights_metadata
from dge_recipes.classes import Classes
from dge_recipes.config import ModelConfig
from dge_recipes.dry_run import dry_run
from dge_recipes.engine.distillation import build_teacher
from dge_recipes.errors import UserError
from dge_recipes.models import create_model, output_names
from dge_recipes.train import train

BEES = Classes(2, ("ant", "bee"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folders called after their classes, and a run on ants and bees."""
    root = tmp_path_factory.mktemp("lab")
    write_lab(root)
    return root


def _weights(lab: Path) -> dict[str, Tensor]:
    return load_file(sorted((lab / "run").glob("checkpoints/*/model.safetensors"))[-1])


def _started(lab: Path, names: Sequence[str] | None, **options: bool) -> nn.Module:
    settings = folder_config(lab / "ant_bee", lab / "unused").model.model_copy(update={"init_from": str(lab / "run")})
    return create_model(settings, 2, classes=Classes(2, None if names is None else tuple(names)), **options)


def test_weights_of_other_classes(lab: Path, tmp_path: Path) -> None:
    start = f"model.init_from={lab / 'run'}"
    config = folder_config(lab / "bee_cat", tmp_path / "new", start, "train.epochs=1")
    words = r"model.init_from: the weights .*run know ant, bee; the images show bee, cat .*; data.classes=new starts"
    for action in (train, dry_run):
        with pytest.raises(UserError, match=words):
            action(config)
    assert list(tmp_path.iterdir()) == []
    train(folder_config(lab / "bee_cat", tmp_path / "new", start, "train.epochs=1", "data.classes=new"))
    newest = next((tmp_path / "new").glob("checkpoints/*/model.safetensors"))
    assert stored_classes(newest) == Classes(2, ("bee", "cat"))


def test_the_same_classes_and_a_head_of_another_size(lab: Path, tmp_path: Path) -> None:
    for data in ("ant_bee", "ant_bee_cat"):
        summary = train(folder_config(lab / data, tmp_path / data, f"model.init_from={lab / 'run'}", "train.epochs=1"))
        assert "_".join(summary["data"]["classes"]) == data


def test_the_head_is_kept_for_the_classes_that_it_knows(lab: Path) -> None:
    stored = _weights(lab)
    for names in (("ant", "bee"), None):
        model = _started(lab, names)
        assert torch.equal(model.head.weight, stored["head.weight"])  # type: ignore[arg-type, union-attr]
        assert output_names(model) == names
    turned = _started(lab, ("bee", "ant"))
    assert torch.equal(turned.head.weight, stored["head.weight"].flip(0))  # type: ignore[arg-type, union-attr]
    assert torch.equal(turned.head.bias, stored["head.bias"].flip(0))  # type: ignore[arg-type, union-attr]


def test_a_new_head_is_new(lab: Path) -> None:
    model, stored = _started(lab, ("bee", "cat"), new_head=True), _weights(lab)
    assert not torch.equal(model.head.weight, stored["head.weight"])  # type: ignore[arg-type, union-attr]
    assert torch.equal(model.blocks[0].attn.qkv.weight, stored["blocks.0.attn.qkv.weight"])  # type: ignore[index, union-attr]


def test_weights_without_names_are_not_compared(lab: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.safetensors"
    save_file(_weights(lab), old, metadata={"format": "pt"})
    start = f"model.init_from={old}"
    assert train(folder_config(lab / "bee_cat", tmp_path / "run", start, "train.epochs=1"))["images"] == 8


def test_weights_that_timm_loads(lab: Path, tmp_path: Path) -> None:
    arguments = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 1}
    model = timm.create_model("vit_tiny_patch16_224", **arguments, num_classes=2)
    content = {"architecture": "vit_tiny_patch16_224", "num_classes": 2, "model_args": arguments}
    content |= {"label_names": ["bee", "cat"], "pretrained_cfg": {"num_classes": 2, "classifier": "head"}}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    settings = ModelConfig(name=f"local-dir:{tmp_path}", kwargs={"pretrained": True})
    with pytest.raises(UserError, match=r"model.kwargs.pretrained: timm's weights know bee, cat; .*data.classes=new"):
        create_model(settings, 2, classes=BEES)
    kept = create_model(settings, 2, classes=Classes(2, ("bee", "cat")))
    turned = create_model(settings, 2, classes=Classes(2, ("cat", "bee")))
    new = create_model(settings, 2, classes=BEES, new_head=True)
    assert torch.equal(kept.head.weight, model.head.weight)  # type: ignore[arg-type, union-attr]
    assert torch.equal(turned.head.weight, model.head.weight.flip(0))  # type: ignore[arg-type, union-attr, operator]
    assert not torch.equal(new.head.weight, model.head.weight)  # type: ignore[arg-type, union-attr]
    create_model(settings, 3, classes=Classes(3, ("ant", "bee", "cat")))  # a head of another size


def test_a_teacher_of_other_classes(lab: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, path = timm.create_model("resnet10t", num_classes=2), tmp_path / "teacher.safetensors"
    options = ("distillation.kind=soft", "distillation.teacher=resnet10t", f"distillation.weights={path}")
    config = folder_config(lab / "ant_bee", tmp_path / "run", *options)
    images, answers = torch.randn(2, 3, 32, 32), []
    for names in (None, ("ant", "bee"), ("bee", "ant")):
        save_file(network.state_dict(), path, metadata=weights_metadata(names))
        teacher = build_teacher(config, 2, (3, 32, 32), BEES)
        assert teacher is not None
        answers.append(teacher(images))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2].flip(1))
    save_file(network.state_dict(), path, metadata=weights_metadata(("bee", "cat")))
    with pytest.raises(UserError, match=r"the teacher's .*teacher.safetensors know bee, cat; the images show ant, bee"):
        train(config)
