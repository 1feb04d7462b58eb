"""What the loop adds to the bare step: the tool that measures it, and what keeps it small."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dge_recipes.config import Config
from dge_recipes.overhead import main
from dge_recipes.training import train
from dge_recipes.training.averages import Averages


def test_the_tool(small: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "overhead.json"
    assert main(["--steps", "3", "--rounds", "2", "--json", str(report), *small, "train.batch_size=8"]) == 0
    found = json.loads(report.read_text(encoding="utf-8"))
    assert min(found["loop_ms"], found["bare_ms"]) > 0
    assert found["overhead"] == pytest.approx(found["loop_ms"] / found["bare_ms"] - 1)
    assert 0 <= found["data_share"] <= 1
    assert "ms in the loop and" in capsys.readouterr().out
    assert main(["--steps", "0"]) == 1


def test_the_device_is_waited_for_only_to_log(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    pops = []
    original = Averages.pop

    def counted(averages: Averages) -> dict[str, Any]:
        pops.append(1)
        return original(averages)

    monkeypatch.setattr(Averages, "pop", counted)
    train(small_config("train.log_every=2"))  # 5 steps in each of two epochs, the last of an epoch logged too
    assert len(pops) == 6
