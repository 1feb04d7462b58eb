"""The measurement of exported models, made small."""

import json
from pathlib import Path

import pytest

from benchmarks import served


def test_a_small_model_in_onnx_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    output = tmp_path / "served.json"
    options = ["--models", "test_vit@128", "--to", "onnx", "--ratios", "0.7", "--batches", "1", "2"]
    assert served.main([*options, "--rounds", "1", "--output", str(output)]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [row["batch"] for row in result["rows"]] == [1, 2]
    assert all(0.4 < row["ratio"] <= 0.7 and row["largest_difference"] < 1e-4 for row in result["rows"])
    assert result["command"].startswith("python -m benchmarks.served --models test_vit")
    assert "| test_vit at 128 | onnx | 0." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "deit_small_patch16_224@x", "resnet18@64"])
def test_models_that_cannot_be(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert served.main(["--models", name]) == 1
    assert f"--models {name}" in capsys.readouterr().err
