"""Speed, and the data loader's share of the time."""

import time
from collections.abc import Iterator

import pytest

from dge_recipes.training.clock import Clock
from dge_recipes.training.progress import Progress


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
