"""A detector that two processes train, killed in the middle of an epoch and continued: equal to one left alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from dense_recipes import dense_tree
from launching import launch

_TRAIN = """
import os, signal, sys
from dge_recipes import train
from dge_recipes.engine.reporting import Reporter

original = Reporter.step

def killed(reporter):
    original(reporter)
    if reporter._progress.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv.pop(1) == "killed":
    Reporter.step = killed
sys.exit(train.main())
"""


def test_two_processes_killed_and_continued(
    command: Callable[..., Any], assert_equal_runs: Callable[..., None], tmp_path: Path
) -> None:
    script, recipe = tmp_path / "train_all.py", tmp_path / "recipe.yaml"
    script.write_text(_TRAIN, encoding="utf-8")
    recipe.write_text(yaml.safe_dump(dense_tree("retinanet", tmp_path)), encoding="utf-8")
    # Steps 1 to 8 in two epochs of 4; checkpoints after 3, 4, 6 and 8.
    state = ("train.ema_decay=0.9", "train.batch_size=2", "train.accumulation_steps=2", "checkpoint.every_steps=3")
    start = [*launch("torchrun", 2)[:-1], str(script)]

    def run(name: str, how: str, *options: str) -> int:
        folder = f"output.dir={tmp_path / name}"
        done = command(*start, how, "--config", str(recipe), *state, folder, *options)
        assert how == "killed" or done.returncode == 0, done.stderr
        return int(done.returncode)

    run("whole", "alone")
    assert run("stopped", "killed") != 0
    assert not (tmp_path / "stopped" / "summary.json").exists()
    run("stopped", "alone", "--resume", "auto")
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")
