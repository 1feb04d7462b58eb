"""Means between two log lines, and their part in a checkpoint."""

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from dge_recipes.training.averages import Averages
from dge_recipes.training.losses import LOSS_NAMES, SHARES


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
