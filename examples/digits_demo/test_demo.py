"""The demonstration, made small."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.digits_demo.__main__ import main
from examples.digits_demo.granularity import regions_with_ink


def test_demo(small: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"
    arguments = ["--output", str(output), "--seed", "3", *small]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    for name in ("dense", "dge"):
        model = summary[name]
        assert 0 <= model["acc1"] <= model["acc5"] <= 100
        assert min(model["macs"], model["images_per_second"]) > 0
    dge = summary["dge"]
    assert dge["mac_ratio"] == pytest.approx(dge["macs"] / summary["dense"]["macs"])
    assert dge["implied_speedup"] == pytest.approx(1 / dge["mac_ratio"])
    assert dge["speedup"] == pytest.approx(dge["images_per_second"] / summary["dense"]["images_per_second"])
    assert (summary["held_out_images"], summary["num_processes"], summary["seed"]) == (360, 1, 3)
    assert all(0 <= share <= 1 for share in dge["fine_share"].values())
    assert "| dense |" in out
    assert "| DGE |" in out
    assert "converted from the dense model" in out
    assert "regions at the finest split:" in out
    with Image.open(output / "granularity.png") as picture:
        assert picture.mode == "RGB"
        assert min(picture.size) > 300
    assert {path.name for path in output.iterdir()} == {"dense", "dge", "granularity.png", "summary.json"}
    assert main(arguments) == 1
    assert "is not empty" in capsys.readouterr().err


def test_demo_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file" / "demo")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert main(["--output", str(tmp_path / "demo"), "no.such=1"]) == 1
    assert "unknown key: 'no.such'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--output", str(tmp_path / "other")]) == 1
    assert "one process" in capsys.readouterr().err


def test_regions_with_ink() -> None:
    image = torch.full((1, 1, 8, 8), -1.0)
    image[0, 0, 1, 6] = 0.5
    image[0, 0, 7, 0] = -0.1
    assert regions_with_ink(image, (2, 2)).tolist() == [[[False, True], [False, False]]]
