"""The order of an epoch."""

from collections import Counter

import pytest

from dge_recipes.data import Draw, EpochSampler
from dge_recipes.errors import UserError


def _images(sampler: EpochSampler) -> list[int]:
    return [draw.image for draw in sampler]


def test_an_epoch_is_whole_steps_of_different_images_in_an_order_of_its_own() -> None:
    sampler = EpochSampler(103, global_batch=10, seed=1)
    first = list(sampler)
    assert (len(sampler), len(first), sampler.steps_per_epoch) == (100, 100, 10)
    assert len({draw.image for draw in first}) == 100
    assert [draw.position for draw in first] == list(range(100))
    sampler.set_epoch(1)
    second = list(sampler)
    assert all(draw.epoch == 1 for draw in second)
    assert [draw.image for draw in second] != [draw.image for draw in first]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    assert _images(EpochSampler(50, 5, seed=1)) == _images(EpochSampler(50, 10, seed=1))
    assert _images(EpochSampler(50, 5, seed=1)) != _images(EpochSampler(50, 5, seed=2))


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_draws_each_image_as_often(repeats: int) -> None:
    sampler = EpochSampler(60, 6, seed=0, repeats=repeats)
    draws = list(sampler)
    assert len(draws) == 60
    assert set(Counter(draw.image for draw in draws).values()) == {repeats}
    # Each repeat has a position, and so an augmentation, of its own.
    assert len({draw.position for draw in draws}) == 60
    sampler.set_epoch(1)
    assert _images(sampler) != [draw.image for draw in draws]


def test_a_training_set_smaller_than_a_step() -> None:
    with pytest.raises(UserError, match=r"one step takes 64 images .* but the training set has 63"):
        EpochSampler(63, 64, seed=0)


def test_draw_travels_between_processes() -> None:
    import pickle

    draw = Draw(1, 2, 3)
    assert pickle.loads(pickle.dumps(draw)) == draw
