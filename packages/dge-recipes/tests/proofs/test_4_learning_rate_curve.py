"""Learning rates and losses over samples seen do not depend on how a step's images are split."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from safetensors.torch import load_file

from dge_recipes.config import load_config
from dge_recipes.errors import UserError
from dge_recipes.train import train

# SGD, because it is linear in the gradient: others blow a rounding error up where a gradient is near zero.
COMMON = ("optim.name=sgd", "optim.lr_batch=128", "schedule.warmup_epochs=1", "train.epochs=2", "train.log_every=1")


def _curve(run: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["kind"] == "train"]


def test_one_process_two_processes_and_accumulation(
    command: Callable[..., Any], small: Sequence[str], tmp_path: Path
) -> None:
    # Without noise, which differs between forwards; routers at their start choose the finest split throughout, so
    # that the penalty, which is not linear in the batch, is the same for every split of the batch.
    common = (*small, *COMMON, "budget.noiseless_epochs=2", "budget.weight=0")
    runs = [tmp_path / each for each in ("1x64", "1x16x4", "2x32")]
    train(load_config("digits", [*common, "train.batch_size=64", f"output.dir={runs[0]}"]))
    split = ("train.batch_size=16", "train.accumulation_steps=4")
    train(load_config("digits", [*common, *split, f"output.dir={runs[1]}"]))
    arguments = ["--config", "digits", *common, "train.batch_size=32", f"output.dir={runs[2]}"]
    result = command(*launch("torchrun", 2), "dge_recipes.train", *arguments)
    assert result.returncode == 0, result.stderr
    first, *others = (_curve(run) for run in runs)
    assert len(first) == 2 * (1437 // 64)
    assert len({record["lr"] for record in first}) > 20
    assert max(record["lr"] for record in first) == pytest.approx(1e-2 * 64 / 128, rel=0.1)  # the cosine has begun
    for other in others:
        assert [(record["step"], record["lr"]) for record in other] == [(each["step"], each["lr"]) for each in first]
        losses = [[record["loss"] for record in curve] for curve in (first, other)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    weights = [load_file(sorted(run.glob("checkpoints/step_*"))[-1] / "model.safetensors") for run in runs]
    for key, value in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5)


def test_a_resumed_run_may_split_its_steps_anew(small: Sequence[str], tmp_path: Path) -> None:
    common = (*small, *COMMON, "budget.noiseless_epochs=2", "budget.weight=0", "checkpoint.keep_last=99")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(load_config("digits", [*common, "train.batch_size=64", "checkpoint.every_steps=9", f"output.dir={whole}"]))
    split = ("train.batch_size=16", "train.accumulation_steps=4", f"output.dir={resumed}")
    train(load_config("digits", [*common, *split]), resume=str(whole / "checkpoints" / "step_00000009"))
    losses = [{record["step"]: record["loss"] for record in _curve(run)} for run in (whole, resumed)]
    assert min(losses[1]) == 10
    for step, loss in losses[1].items():
        assert loss == pytest.approx(losses[0][step], rel=1e-4)
    wrong = load_config("digits", [*common, *split, "train.accumulation_steps=2", f"output.dir={tmp_path / 'wrong'}"])
    with pytest.raises(UserError, match="trained with global_batch 64, this run has 32"):
        train(wrong, resume=str(whole / "checkpoints" / "step_00000009"))
