"""The training module: task loss, budget, and what it reports."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from dge_models import deterministic_routing, mac_ratio
from dge_recipes.config import Config
from dge_recipes.engine.losses import LOSS_NAMES, MEASURED, SHARES, LossModule
from dge_recipes.models import build_model


def _module(config: Config) -> LossModule:
    torch.manual_seed(0)
    return LossModule(build_model(config.model, 10, (1, 32, 32)), config)


def test_a_routed_model_pays_for_its_macs(small_config: Callable[..., Config]) -> None:
    module = _module(small_config("budget.target=0.3", "budget.weight=2", "train.label_smoothing=0.2"))
    images, labels = torch.randn(6, 1, 32, 32), torch.arange(6)
    with deterministic_routing():
        losses = module(images, labels)
        logits, routings = module.model.forward_routed(images)  # type: ignore[operator]
    ratio = mac_ratio(module.model, routings)
    assert set(losses) == {*LOSS_NAMES, MEASURED, SHARES}
    torch.testing.assert_close(losses["task"], F.cross_entropy(logits, labels, label_smoothing=0.2))
    torch.testing.assert_close(losses["mac_ratio"], ratio)
    torch.testing.assert_close(losses["budget"], 2 * (ratio - 0.3) ** 2)
    torch.testing.assert_close(losses["loss"], losses["task"] + losses["budget"])
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_every_parameter_gets_a_gradient(small_config: Callable[..., Config], mode: str) -> None:
    module = _module(small_config(f"model.training_mode={mode}"))
    module(torch.randn(6, 1, 32, 32), torch.arange(6))["loss"].backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_dense_model_has_no_budget(small_config: Callable[..., Config]) -> None:
    losses = _module(small_config(name="digits_dense"))(torch.randn(4, 1, 32, 32), torch.arange(4))
    assert (losses["budget"].item(), losses["mac_ratio"].item()) == (0.0, 1.0)
    assert torch.equal(losses["loss"], losses["task"])


def test_mixed_targets_are_not_smoothed_twice(small_config: Callable[..., Config]) -> None:
    module = _module(small_config("mixing.mixup=0.8", name="digits_dense"))
    images, targets = torch.randn(4, 1, 32, 32), torch.rand(4, 10).softmax(1)
    losses = module(images, targets)
    torch.testing.assert_close(losses["task"], F.cross_entropy(module.model(images), targets))
    assert losses["accuracy"].item() == (module.model(images).argmax(1) == targets.argmax(1)).float().mean().item()
