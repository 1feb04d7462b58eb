"""Activation checkpointing and compilation change how a run computes, not what."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dge_recipes.config import Config
from dge_recipes.errors import UserError
from dge_recipes.train import train


def _losses(config: Config) -> list[float]:
    lines = (Path(config.output.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("option", ["train.checkpoint_activations=true", "train.compile=aot_eager"])
def test_same_losses(small_config: Callable[..., Config], option: str) -> None:
    common = ("train.epochs=1", "train.log_every=1", "budget.noiseless_epochs=1", "optim.name=sgd")
    plain, other = small_config(*common, output="plain"), small_config(*common, option, output="other")
    train(plain)
    train(other)
    assert _losses(other) == pytest.approx(_losses(plain), rel=1e-4)


def test_mistakes(small_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"train.compile: got 'fast', expected one of .*inductor"):
        train(small_config("train.compile=fast"))
    with pytest.raises(UserError, match=r"budget.target=0.01 is out of reach: .* still computes 0\.[0-9]+ of its MACs"):
        train(small_config("budget.target=0.01"))
