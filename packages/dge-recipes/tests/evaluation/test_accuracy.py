"""Evaluation: exact counts, exact accuracy, mean MACs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dge_models import count_macs
from dge_recipes.config import Config
from dge_recipes.data import build_held_out
from dge_recipes.evaluation import evaluate
from dge_recipes.models import build_model


def _model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(config.model, 10, (1, 32, 32))
    for name, parameter in model.named_parameters():
        if "router" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("batch_size", [1, 7, 100, 360, 500])
def test_every_image_counts_once_whatever_the_batch(small_config: Callable[..., Config], batch_size: int) -> None:
    accelerator = Accelerator(cpu=True)
    images, labels = torch.randn(25, 1, 32, 32), torch.arange(25) % 10
    model = _model(small_config())
    loader = accelerator.prepare(DataLoader(TensorDataset(images, labels), batch_size))
    result = evaluate(model, loader, accelerator, 25)
    model.eval()
    with torch.no_grad():
        logits = model(images)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    count = count_macs(model, images)
    assert result.images == 25
    assert result.acc1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert result.acc5 == pytest.approx(100 * top5)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.macs == pytest.approx(count.total.mean().item(), rel=1e-6)
    assert result.mac_ratio == pytest.approx(count.total.mean().item() / count.static_total, rel=1e-6)
    assert result.mac_ratio < 1


def test_a_dense_model_costs_the_same_for_every_image(small_config: Callable[..., Config]) -> None:
    accelerator = Accelerator(cpu=True)
    config = small_config(name="digits_dense")
    held_out, model = build_held_out(config), _model(config)
    result = evaluate(model, accelerator.prepare(held_out.loader), accelerator, 360)
    assert (result.images, result.mac_ratio) == (360, 1.0)
    assert result.macs == count_macs(model, torch.zeros(1, 1, 32, 32)).static_total


def test_the_mode_is_restored(small_config: Callable[..., Config]) -> None:
    accelerator = Accelerator(cpu=True)
    data = [(torch.randn(2, 1, 32, 32), torch.tensor([1, 2]))]
    for training in (True, False):
        model = _model(small_config()).train(training)
        evaluate(model, data, accelerator, 2)
        assert model.training is training


def test_a_wrong_count_is_a_fault_of_the_program(small_config: Callable[..., Config]) -> None:
    data: list[tuple[Tensor, Tensor]] = [(torch.randn(2, 1, 32, 32), torch.tensor([1, 2]))]
    with pytest.raises(RuntimeError, match="evaluated 2 images, but the data set has 3"):
        evaluate(_model(small_config()), data, Accelerator(cpu=True), 3)


def test_fewer_than_five_classes() -> None:
    class Two(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :2]

    from dge_recipes.evaluation.accuracy import _scores

    logits: Any = Two()(torch.randn(3, 1, 2, 2))
    top1, top5, _ = _scores(logits, logits.argmin(1))
    assert (top1.sum().item(), top5.sum().item()) == (0.0, 3.0)
