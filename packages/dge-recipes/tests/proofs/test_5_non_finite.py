"""A loss that is not finite stops the run with the step, the terms and the batch; or its step is skipped, and told."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dge_recipes.checkpoints import CheckpointStore
from dge_recipes.config import Config
from dge_recipes.engine import non_finite
from dge_recipes.engine.losses import LOSS_NAMES, LossModule
from dge_recipes.engine.non_finite import LossWatch
from dge_recipes.engine.progress import StepPosition
from dge_recipes.errors import UserError
from dge_recipes.train import train


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have chosen forwards of a run, counted from 1, see one broken image."""

    def apply(*forwards: int) -> None:
        original, count = LossModule.forward, iter(range(1, 10**6))

        def poisoned(module: LossModule, images: Tensor, *rest: Any) -> dict[str, Tensor]:
            if next(count) in forwards:
                images[0, 0, 0, 0] = float("inf")
            return original(module, images, *rest)

        monkeypatch.setattr(LossModule, "forward", poisoned)

    return apply


def _steps(config: Config) -> list[str]:
    return [folder.name for folder in CheckpointStore(Path(config.output.dir) / "checkpoints").folders()]


def test_the_run_stops_with_step_terms_and_batch(
    small_config: Callable[..., Config], poison: Callable[..., None]
) -> None:
    poison(8)  # with 2 forwards per step the second of step 4
    config = small_config("train.batch_size=120", "train.accumulation_steps=2", "checkpoint.every_steps=1")
    with pytest.raises(UserError, match=r"not finite at step 4 in process 0 \(task nan, budget nan\)") as error:
        train(config)
    file = Path(config.output.dir) / "bad_batches" / "step_00000004_process_0.safetensors"
    assert f"its batch is in {file}" in str(error.value)
    with safe_open(file, "pt") as content:
        facts = {name: json.loads(text) for name, text in content.metadata().items()}
        images, targets = content.get_tensor("images"), content.get_tensor("targets")
    assert (facts["step"], facts["position"], facts["seed"]) == (4, [0, 7, 0], 0)
    assert facts["terms"]["task"] == "nan"
    assert (images.shape, targets.shape, targets.dtype) == ((120, 1, 32, 32), (120,), torch.int64)
    assert images[0, 0, 0, 0] == float("inf")
    # The broken step's weights were due for a checkpoint, and must not have become one.
    assert _steps(config)[-1] == "step_00000003"


def test_weights_that_are_not_finite_are_not_saved(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dge_recipes.train.halt_if_due", _break_weights)
    with pytest.raises(UserError, match="weights are not finite after step 2: no checkpoint is written"):
        train(small_config("checkpoint.every_steps=1"))
    assert _steps(small_config()) == ["step_00000001"]


def _break_weights(run: Any, **_: Any) -> None:
    if run.progress.step == 2:
        run.model.head.weight.data[0, 0] = float("nan")


def test_skipped_steps_are_counted_told_and_harmless(
    small_config: Callable[..., Config], poison: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    poison(3, 7)
    config = small_config("train.non_finite=skip", "train.log_every=1")
    with caplog.at_level(logging.WARNING):
        summary = train(config)
    assert (summary["skipped_steps"], summary["steps"]) == (2, 10)
    assert "step skipped, 2 so far: the loss is not finite at step 7" in caplog.text
    assert len(list((Path(config.output.dir) / "bad_batches").iterdir())) == 2
    records = [json.loads(line) for line in (Path(config.output.dir) / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 10
    assert all(abs(loss) < 100 for loss in losses)


def test_a_gradient_that_is_not_finite_is_skipped(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LossModule.forward

    def steep(module: LossModule, *arguments: Any) -> dict[str, Tensor]:
        losses = original(module, *arguments)
        # The value of a square root at zero is finite, its slope is not.
        return {**losses, "loss": losses["loss"] + (losses["loss"] * 0).sqrt()}

    monkeypatch.setattr(LossModule, "forward", steep)
    with pytest.raises(UserError, match=r"a gradient is not finite at step 3; more than train.skip_limit=2 steps"):
        train(small_config("train.non_finite=skip", "train.skip_limit=2"))


def test_too_many_skipped_steps_stop_the_run(small_config: Callable[..., Config], poison: Callable[..., None]) -> None:
    poison(*range(2, 9))
    with pytest.raises(UserError, match=r"not finite at step 5.*more than train.skip_limit=3 steps had to be skipped"):
        train(small_config("train.non_finite=skip", "train.skip_limit=3"))


def test_on_an_accelerator_a_loss_is_looked_at_one_forward_late(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Event:
        def __init__(self, device: torch.device) -> None:
            events.append("made")

        def record(self) -> None:
            events.append("recorded")

        def synchronize(self) -> None:
            events.append("waited")

    monkeypatch.setattr(non_finite.torch, "Event", Event)
    monkeypatch.setattr(non_finite, "_host_tensor", torch.empty_like)
    watch, images = LossWatch(torch.device("meta")), torch.zeros(2, 1, 4, 4)
    for step, loss in ((1, 1.0), (2, float("nan")), (3, 1.0)):
        watch.watch(StepPosition(step, (0, step - 1, 0)), torch.full((len(LOSS_NAMES),), loss), images, images)
        found = watch.look()
        assert (found is None) == (step < 3)
    assert events.count("waited") == 2  # never for the newest
    assert found is not None
    assert found.place.step == 2
    watch.forget()
    watch.watch(StepPosition(4, (0, 3, 0)), torch.full((len(LOSS_NAMES),), float("inf")), images, images)
    bad = watch.look(wait=True)
    assert bad is not None
    assert bad.place.step == 4
