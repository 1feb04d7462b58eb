"""``dge-eval`` as a user types it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dge_recipes.config import load_config
from dge_recipes.evaluate import main
from dge_recipes.train import train


@pytest.fixture
def run(small: Sequence[str], tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    train(load_config("digits", [*small, f"output.dir={folder}", "train.ema_decay=0.5", "train.epochs=1"]))
    return folder


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("dge-eval: error: ")
    return captured.err


def test_a_run_knows_its_config(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    newest = run / "checkpoints" / "step_00000005"
    for number, arguments in enumerate(
        ([str(run)], [str(run), "--best"], [str(newest)], [str(newest / "model.safetensors")])
    ):
        report = tmp_path / "reports" / f"{number}.json"
        assert main([*arguments, "--json", str(report)]) == 0
        assert json.loads(report.read_text(encoding="utf-8"))["acc1"] == summary["acc1"]
    out = capsys.readouterr().out
    assert out.count("| deit_dge_s124_tiny_patch16_256 |") == 4
    assert "360 images, 1 process\n" in out


def test_averaged_weights(run: Path, tmp_path: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert main([str(run), "--ema", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["loss"] == pytest.approx(summary["ema"]["loss"])


def test_mistakes(run: Path, small: Sequence[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((run / "checkpoints" / "step_00000005" / "model.safetensors").read_bytes())
    assert "does not exist" in _error(capsys, str(tmp_path / "gone"), "--config", "digits")
    assert "say which recipe" in _error(capsys, str(bare))
    assert "doesn't fit" in _error(capsys, str(bare), "--config", "digits_dense", *small)
    assert "unknown key" in _error(capsys, str(bare), "--config", "digits", "data.foo=1")
    bare.write_bytes(bare.read_bytes()[:-9])
    assert "truncated" in _error(capsys, str(bare), "--config", "digits", *small)
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert main([str(run), "--json", str(tmp_path / "file" / "report.json")]) == 1
    assert "cannot write" in capsys.readouterr().err
