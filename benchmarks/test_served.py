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


@pytest.mark.parametrize(("to", "product"), [("onnx", "MatMul"), ("openvino", "FullyConnected")])
def test_a_profile_tells_where_the_time_goes(
    to: str, product: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for needed in ("onnxscript", "onnxruntime" if to == "onnx" else "openvino"):
        pytest.importorskip(needed, reason=f"needs {needed}")
    output = tmp_path / "profile.json"
    options = ["--profile", "--models", "test_vit@128", "--to", to, "--ratios", "0.7", "--batches", "1"]
    assert served.main([*options, "--rounds", "2", "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text(encoding="utf-8"))["rows"]
    count: dict[str, dict[str, int]] = {}
    for each in row["operators"]:
        kind = count.setdefault(each["operator"].split(" ")[0], {"dense": 0, "DGE": 0})
        for name in kind:
            assert (each[name]["ms"] > 0) == (each[name]["count"] > 0)
            kind[name] += each[name]["count"]
    assert min(count[product].values()) >= 4
    assert (count["TopK"]["dense"], count["TopK"]["DGE"] > 0) == (0, True)  # one per routed layer
    most = [max(each["dense"]["ms"], each["DGE"]["ms"]) for each in row["operators"]]
    assert most == sorted(most, reverse=True)
    printed = capsys.readouterr().out
    assert f"| test_vit at 128, {to}, MAC ratio 0." in printed
    assert "| all | " in printed
