"""Learning rates: warm-up and what follows it per step, scaled to the global batch."""

from collections.abc import Callable
from math import cos, pi
from typing import Any

import pytest
import torch
from torch import nn

from dge_recipes.config import Config, OptimConfig, ScheduleConfig
from dge_recipes.engine.optimization import build_optimizer, build_schedule, scaled_rate
from dge_recipes.errors import UserError


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2, 3))

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


def _rates(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int, lr: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=lr)
    scheduler = build_schedule(schedule, optimizer, steps_per_epoch, epochs)
    rates = []
    for step in range(1, steps_per_epoch * epochs + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step)
    return rates


def test_warm_up_then_cosine_to_the_floor() -> None:
    rates = _rates(ScheduleConfig(warmup_epochs=2, warmup_lr=0.1, min_lr=0.01), steps_per_epoch=5, epochs=10)
    expected = [0.1 + 0.9 * step / 10 for step in range(10)]
    expected += [0.01 + 0.5 * 0.99 * (1 + cos(pi * step / 50)) for step in range(10, 50)]
    assert rates == pytest.approx(expected)


def test_warm_up_then_steps() -> None:
    schedule = ScheduleConfig(kind="step", milestones=(2, 2.75), gamma=0.1, warmup_epochs=0.5, warmup_lr=0.2)
    rates = _rates(schedule, steps_per_epoch=4, epochs=4)
    assert rates == pytest.approx([0.2, 0.6] + [1.0] * 6 + [0.1] * 3 + [0.01] * 5)


def test_warm_up_then_a_polynomial_to_the_floor() -> None:
    schedule = ScheduleConfig(kind="poly", power=0.9, warmup_epochs=1, warmup_lr=0.5, min_lr=0.01)
    expected = [0.5 + 0.5 * step / 4 for step in range(4)]
    expected += [0.01 + 0.99 * (1 - step / 20) ** 0.9 for step in range(4, 20)]
    assert _rates(schedule, steps_per_epoch=4, epochs=5) == pytest.approx(expected)


def test_a_step_schedule_has_no_floor_to_be_above_its_peak() -> None:
    schedule = ScheduleConfig(kind="step", milestones=(1,), warmup_lr=0)  # min_lr is 1e-5
    assert _rates(schedule, 1, 2, lr=1e-6) == pytest.approx([1e-6, 1e-7])


def test_no_warm_up_starts_at_the_peak() -> None:
    assert _rates(ScheduleConfig(min_lr=0), steps_per_epoch=4, epochs=1) == pytest.approx(
        [0.5 * (1 + cos(pi * step / 4)) for step in range(4)]
    )


def test_the_rate_is_a_function_of_the_step() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = build_schedule(ScheduleConfig(warmup_epochs=1), optimizer, 10, 5)
    schedule.step_update(37)
    jumped = optimizer.param_groups[0]["lr"]
    assert _rates(ScheduleConfig(warmup_epochs=1), 10, 5)[37] == jumped


def test_the_rate_is_scaled_to_the_global_batch() -> None:
    assert scaled_rate(OptimConfig(lr=5e-4, lr_batch=512), 1024) == pytest.approx(1e-3)
    assert scaled_rate(OptimConfig(lr=5e-4), 1024) == 5e-4


def test_only_matrices_decay(small_config: Callable[..., Config]) -> None:
    model = _Net()
    optimizer = build_optimizer(OptimConfig(lr=1e-3, weight_decay=0.05, betas=(0.8, 0.9)), model, 64)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "linear.weight": 0.05,
        "linear.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "pos_embed": 0.0,
    }
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}


def test_what_decays_of_a_network_with_a_model_inside() -> None:
    network = nn.ModuleDict({"backbone": _Net(), "head": nn.Linear(2, 2)})
    optimizer = build_optimizer(OptimConfig(lr=1e-3, weight_decay=0.05), network, 64)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decaying = {name for name, p in network.named_parameters() if decays[id(p)]}
    assert decaying == {"backbone.linear.weight", "head.weight"}
    assert len(decays) == len(list(network.parameters()))


@pytest.mark.parametrize("options", [{"name": "no_such"}, {"name": "sgd", "betas": (0.9, 0.99)}])
def test_an_optimiser_that_does_not_exist_or_takes_no_such_argument(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"optim\.name=(no_such|sgd)"):
        build_optimizer(OptimConfig(lr=1e-3, **options), _Net(), 64)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"warmup_epochs": 3}, "leaves nothing of train.epochs=3"),
        ({"warmup_lr": 2.0}, "schedule.warmup_lr=2 is above the peak"),
        ({"min_lr": 2.0}, "schedule.min_lr=2 is above the peak"),
        ({"kind": "step"}, r"milestones: got \[\], expected ascending epochs below train.epochs=3"),
        ({"kind": "step", "milestones": (2, 1)}, r"got \[2.0, 1.0\], expected ascending"),
        ({"kind": "step", "milestones": (3,)}, r"got \[3.0\], expected ascending epochs below"),
        ({"kind": "poly", "milestones": (1,)}, "expected none with schedule.kind=poly"),
    ],
)
def test_schedules_that_make_no_sense(schedule: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _rates(ScheduleConfig(**schedule), steps_per_epoch=2, epochs=3)
