"""Evaluation counts every image once: its numbers are those of one process, whatever the number of processes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from launching import launch

from dge_recipes.config import load_config
from dge_recipes.evaluate import main
from dge_recipes.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small: Sequence[str]) -> Path:
    """One small run, by one process."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(load_config("digits", [*small, f"output.dir={folder}"]))
    return folder


@pytest.mark.parametrize("batch_size", [7, 100, 360])
def test_any_batch_size(trained: Path, tmp_path: Path, batch_size: int) -> None:
    report = tmp_path / "report.json"
    assert main([str(trained), f"eval.batch_size={batch_size}", "--json", str(report)]) == 0
    _check(report, trained, 1)


@pytest.mark.parametrize(("launcher", "count"), [("accelerate", 3), ("torchrun", 2)])
def test_any_number_of_processes(
    command: Callable[..., Any], trained: Path, tmp_path: Path, launcher: str, count: int
) -> None:
    # 360 images in batches of 50: the last ones are padded, and the padding must not be counted.
    report = tmp_path / "report.json"
    arguments = [*launch(launcher, count), "dge_recipes.evaluate", str(trained), "eval.batch_size=50"]
    result = command(*arguments, "--json", str(report))
    assert result.returncode == 0, result.stderr
    _check(report, trained, count)


def _check(report: Path, trained: Path, processes: int) -> None:
    found = json.loads(report.read_text(encoding="utf-8"))
    expected = json.loads((trained / "summary.json").read_text(encoding="utf-8"))
    assert (found["num_processes"], found["images"], found["unreadable"]) == (processes, 360, 0)
    assert (found["acc1"], found["acc5"]) == (expected["acc1"], expected["acc5"])
    assert found["macs"] == pytest.approx(expected["macs"], rel=1e-9)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
