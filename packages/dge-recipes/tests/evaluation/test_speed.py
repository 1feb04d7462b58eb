"""Timing."""

import time

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dge_recipes.evaluation import first_images, images_per_second, measure_speed, time_forwards


class _Sleeper(nn.Module):
    def __init__(self, seconds: float, log: list[str], name: str) -> None:
        super().__init__()
        self.seconds, self.log, self.name = seconds, log, name

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        self.log.append(f"{self.name}{int(images[0, 0])}")
        time.sleep(self.seconds)
        return images


def test_models_alternate_on_the_same_batches() -> None:
    log: list[str] = []
    models = {"a": _Sleeper(0.02, log, "a"), "b": _Sleeper(0.001, log, "b").eval()}
    batches = [torch.full((4, 1), value) for value in (0.0, 1.0)]
    seconds = time_forwards(models, batches, rounds=3, warmup=1)
    assert log == ["a0", "b0", "a1", "b1", "a0", "b0", "a1", "b1"]
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}
    assert min(seconds["a"]) >= 0.02
    assert sorted(seconds["b"])[1] < 0.02
    assert (models["a"].training, models["b"].training) == (True, False)


def test_throughput_is_of_the_median() -> None:
    assert images_per_second([0.1, 0.2, 9.0], 64) == pytest.approx(320)


def test_no_rounds_measure_nothing() -> None:
    data = TensorDataset(torch.zeros(10, 1), torch.zeros(10))
    assert measure_speed(nn.Identity(), data, 4, 0, Accelerator(cpu=True)) is None
    assert measure_speed(_Sleeper(0.01, [], "a"), data, 4, 3, Accelerator(cpu=True)) < 400  # type: ignore[operator]


def test_first_images_of_a_small_set() -> None:
    data = TensorDataset(torch.arange(3.0)[:, None], torch.zeros(3))
    assert first_images(data, 10).tolist() == [[0.0], [1.0], [2.0]]
