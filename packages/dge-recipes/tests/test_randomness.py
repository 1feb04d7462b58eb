"""Seeds: functions of the place in the run, and of nothing else."""

import random

import numpy as np
import torch

from dge_recipes.randomness import derive_seed, isolated_seed, seed_everything


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_seeds_differ_by_purpose_and_position_and_repeat() -> None:
    arguments = [(0, "a"), (0, "b"), (1, "a"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 1), (0, "a", 1, 0)]
    seeds = [derive_seed(*each) for each in arguments]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [derive_seed(*each) for each in arguments]
    assert derive_seed(0, "augment", 3, 1436) == 3934447670


def test_isolated_seed_draws_the_same_and_disturbs_nothing() -> None:
    seed_everything(1)
    expected = [_draw(), _draw()]
    seed_everything(1)
    first = _draw()
    with isolated_seed(7):
        inside = _draw()
    second = _draw()
    assert [first, second] == expected
    with isolated_seed(7):
        assert _draw() == inside


def test_isolated_seed_restores_after_an_error() -> None:
    seed_everything(2)
    expected = _draw()
    seed_everything(2)
    try:
        with isolated_seed(7):
            raise KeyError
    except KeyError:
        pass
    assert _draw() == expected
