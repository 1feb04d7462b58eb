"""Distillation: what the loss is, who the teacher is, and a run of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from dge_recipes.config import Config, ImageFolderData
from dge_recipes.engine.distillation import Teacher, build_teacher, distillation_loss
from dge_recipes.engine.losses import LossModule
from dge_recipes.errors import UserError
from dge_recipes.models import build_model
from dge_recipes.train import train


def test_losses() -> None:
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    hard = distillation_loss(student, teacher, "hard", 3.0)
    torch.testing.assert_close(hard, F.cross_entropy(student, teacher.argmax(1)))
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = (p * (p.log() - q.log())).sum() * 4 / 40
    torch.testing.assert_close(distillation_loss(student, teacher, "soft", 2.0), expected)
    assert distillation_loss(teacher, teacher, "soft", 2.0).abs() < 1e-6


def test_a_teacher_of_another_normalisation_sees_its_own() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)  # trained on mean and std 0.5
    data = ImageFolderData(name="imagefolder", root=".")
    teacher = Teacher(network, data)
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (data.mean, data.std))
    torch.testing.assert_close(teacher((pixels - mean) / std), network((pixels - 0.5) / 0.5), atol=1e-5, rtol=1e-5)


@pytest.fixture
def teacher(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "teacher.safetensors"
    torch.manual_seed(5)
    save_file(timm.create_model("resnet10t", num_classes=10, in_chans=1).state_dict(), path)
    return ("distillation.teacher=resnet10t", f"distillation.weights={path}")


def test_the_second_head_learns_from_the_teacher(small_config: Callable[..., Config]) -> None:
    name = "model.name=deit_dge_s124_tiny_distilled_patch16_256"
    options = ("model.kwargs.class_token=true", "model.kwargs.global_pool=token", "distillation.kind=hard")
    config = small_config(name, *options, "distillation.alpha=0.25", "budget.weight=0", "train.label_smoothing=0")
    model = build_model(config.model, 10, (1, 32, 32))
    model.set_distilled_training(True)  # type: ignore[operator]
    module, images, labels, answers = (
        LossModule(model, config),
        torch.randn(4, 1, 32, 32),
        torch.arange(4),
        torch.eye(10)[5:9],
    )
    torch.manual_seed(0)
    losses = module(images, labels, answers)
    torch.manual_seed(0)
    first, second = model.forward_routed(images)[0]  # type: ignore[operator]
    torch.testing.assert_close(losses["task"], F.cross_entropy(first, labels))
    torch.testing.assert_close(losses["distillation"], F.cross_entropy(second, torch.arange(5, 9)))
    torch.testing.assert_close(losses["loss"], 0.75 * losses["task"] + 0.25 * losses["distillation"])


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_run(small_config: Callable[..., Config], teacher: tuple[str, ...], kind: str) -> None:
    config = small_config(*teacher, f"distillation.kind={kind}", "train.epochs=1", "data.image_size=32")
    train(config)
    first = json.loads((Path(config.output.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["distillation"] > 0
    half = 0.5 * first["task"] + 0.5 * first["distillation"] + first["budget"]
    assert first["loss"] == pytest.approx(half, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["distillation.kind=soft"], "needs distillation.teacher"),
        (["distillation.kind=soft", "distillation.teacher=resnet10z", "distillation.weights=x"], "no model is called"),
        (["distillation.kind=soft", "distillation.teacher=resnet10t", "distillation.weights=/no/x.pth"], "/no/x.pth"),
    ],
)
def test_mistakes(small_config: Callable[..., Config], overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_teacher(small_config(*overrides), 10, (1, 32, 32))
