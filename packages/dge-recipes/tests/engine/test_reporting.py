"""Means between two log lines, their part in a checkpoint, and the data loader's share of the time."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from dge_recipes.config import Config
from dge_recipes.engine.losses import LOSS_NAMES, SHARES
from dge_recipes.engine.progress import Progress
from dge_recipes.engine.reporting import Averages, Clock
from dge_recipes.train import train


def _losses(value: float, shares: Tensor) -> dict[str, Tensor]:
    return {**{name: torch.tensor(value) for name in LOSS_NAMES}, SHARES: shares}


def test_means_and_continuation() -> None:
    first, second = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    averages = Averages(Accelerator(cpu=True))
    averages.add(_losses(1.0, first))
    resumed = Averages(Accelerator(cpu=True))
    resumed.load_state_dict(averages.state_dict())
    for each in (averages, resumed):
        each.add(_losses(4.0, second))
        means = each.pop()
        assert [means[name] for name in LOSS_NAMES] == pytest.approx([2.5] * len(LOSS_NAMES))
        assert means[SHARES] == [[0.5, 0.5], [0.5, 0.5]]
        assert each.pop()["loss"] == 0


def test_without_routers_there_are_no_shares() -> None:
    averages = Averages(Accelerator(cpu=True))
    averages.add(_losses(1.0, torch.zeros(0, 0)))
    assert set(averages.pop()) == set(LOSS_NAMES)


def test_the_device_is_waited_for_only_to_log(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    pops = []
    original = Averages.pop

    def counted(averages: Averages) -> dict[str, Any]:
        pops.append(1)
        return original(averages)

    monkeypatch.setattr(Averages, "pop", counted)
    train(small_config("train.log_every=2"))  # 5 steps in each of two epochs, the last of an epoch logged too
    assert len(pops) == 6


def _slow() -> Iterator[int]:
    for number in range(3):
        time.sleep(0.03)
        yield number


def test_waiting_is_told_apart_from_working() -> None:
    progress = Progress(steps_per_epoch=3, global_batch=8)
    clock = Clock(progress)
    for _ in clock.waiting(_slow()):
        time.sleep(0.01)
        clock.steps += 1
    timing = clock.lap()
    assert 0.5 < timing["data_share"] < 0.95
    assert progress.seconds >= 0.12
    assert timing["images_per_second"] == pytest.approx(24 / progress.seconds)
    assert clock.steps == 0
