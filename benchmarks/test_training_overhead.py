"""What the loop adds to the bare step: the tool that measures it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.training_overhead import main


def test_the_tool(small: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "overhead.json"
    assert main(["--steps", "3", "--rounds", "2", "--json", str(report), *small, "train.batch_size=8"]) == 0
    found = json.loads(report.read_text(encoding="utf-8"))
    assert min(found["loop_ms"], found["bare_ms"]) > 0
    assert found["overhead"] == pytest.approx(found["loop_ms"] / found["bare_ms"] - 1)
    assert 0 <= found["data_share"] <= 1
    assert "ms in the loop and" in capsys.readouterr().out
    assert main(["--steps", "0"]) == 1
