"""The measurement of large images, made small."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import resolution


def test_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "resolution.json"
    options = ["--models", "test_vit", "--sizes", "128", "--rounds", "1", "--ratio", "0.7", "--batch", "4"]
    assert resolution.main([*options, "--output", str(output)]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    (row,) = result["rows"]
    assert row["ratio"] == pytest.approx(0.7, abs=0.02)
    assert row["macs"]["DGE"] == pytest.approx(row["ratio"] * row["macs"]["dense"], rel=0.01)
    assert min(*row["seconds"].values(), *row["peak_bytes"].values()) > 0
    assert {"python", "torch", "commit", "date", "command"} <= result.keys()
    assert "| test_vit | 128 × 128 | 0." in capsys.readouterr().out


def _row(size: int, cost: float) -> dict[str, Any]:
    each = {"dense": 2 * cost, "DGE": cost}
    return {"image_size": size, "macs": each, "seconds": each, "peak_bytes": each}


def test_growth_is_told_over_all_sizes_and_the_last_two() -> None:
    rows = [_row(1, 1.0), _row(2, 4.0), _row(4, 64.0)]
    assert resolution._growth_lines("vit", rows[:1]) == []
    lines = resolution._growth_lines("vit", rows)
    assert lines[0] == "vit, growth of macs: dense 1.50 (2.00), DGE 1.50 (2.00)"
    assert [line.split(":")[0] for line in lines[1:]] == ["vit, growth of seconds", "vit, growth of peak memory"]


def test_growth() -> None:
    assert resolution.growth([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(1.0)
    assert resolution.growth([256, 1024], [1.0, 256.0]) == pytest.approx(2.0)


@pytest.mark.parametrize("options", [["--models", "resnet18"], ["--sizes", "64", "64"], ["--rounds", "0"]])
def test_what_cannot_be(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    defaults = ["--models", "test_vit", "--sizes", "64"]
    assert resolution.main([*defaults, *options]) == 1
    assert options[0] in capsys.readouterr().err
