"""Counters of a run."""

import pytest

from dge_recipes.engine.progress import Progress


def test_epochs_follow_from_steps() -> None:
    progress = Progress(steps_per_epoch=7, global_batch=64, step=16)
    assert (progress.epoch, progress.step_in_epoch) == (2, 2)


def test_round_trip() -> None:
    saved = Progress(7, 64, step=16, seconds=2.5, best_score=90.0).state_dict()
    progress = Progress(7, 64)
    progress.load_state_dict(saved)
    assert progress == Progress(7, 64, step=16, seconds=2.5, best_score=90.0)


@pytest.mark.parametrize(("other", "words"), [((8, 64), "steps_per_epoch 7"), ((7, 32), "global_batch 64")])
def test_steps_of_another_size_are_refused(other: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Progress(*other).load_state_dict(Progress(7, 64).state_dict())
