"""``dge-export`` as a user types it."""

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import draw_pictures, small_vit
from torch import nn

import dge_models
from dge_recipes.commands.export import main
from dge_recipes.data.image_sets import open_source
from dge_recipes.data.images import HeldOutImages
from dge_recipes.evaluate import evaluate_checkpoint
from dge_recipes.evaluation.target import find_target
from dge_recipes.export import engine

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

_NAMES = ["apple", "beech", "cedar"]
# Runs a script where nothing of the project, nor what it stands on, can be imported.
_ALONE = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "timm", "dge_kernels", "dge_models", "dge_recipes", "onnx"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _stirred(num_classes: int = 3) -> nn.Module:
    """Weights that are large enough for pictures to be told apart, and for regions to differ."""
    model = small_vit(num_classes, depth=1, global_pool="avg")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if num_classes:
        model.pretrained_cfg.update(label_names=_NAMES)  # type: ignore[operator, union-attr]
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder, whose pictures dge-export takes as pictures without labels."""
    root = tmp_path_factory.mktemp("data")
    for part in ("train", "val"):
        for name in _NAMES:
            draw_pictures(root / part / name, 6)
    return root


@pytest.fixture(scope="module")
def routed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that routes, with fixed queries."""
    model = dge_models.from_timm(_stirred(), (2, 1))
    with torch.no_grad():
        for router in (module for module in model.modules() if isinstance(module, dge_models.Router)):
            router.gate.weight.copy_(torch.randn_like(router.gate.weight))
    dge_models.set_fixed_queries(model, 0.7)
    folder = tmp_path_factory.mktemp("models") / "routed"
    dge_models.save_pretrained(model, folder)
    return folder


@pytest.fixture(scope="module")
def served(routed: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What dge-export makes of it, for any number of pictures."""
    out = tmp_path_factory.mktemp("exports") / "served"
    options = ["--batch", "dynamic", "--rounds", "2", "--output", str(out)]
    assert main([str(routed), "--to", "onnx", "--images", str(data / "val"), *options]) == 0
    return out


def test_the_folder_says_what_it_is(served: Path, routed: Path) -> None:
    assert sorted(path.name for path in served.iterdir()) == ["classify.py", "model.json", "model.onnx"]
    facts = json.loads((served / "model.json").read_text(encoding="utf-8"))
    assert facts["inputs"] == [{"name": "images", "shape": [None, 3, 64, 64], "dtype": "float32"}]
    assert facts["outputs"] == [{"name": "output", "shape": [None, 3], "dtype": "float32"}]
    assert (facts["classes"], facts["to"], facts["precision"], facts["kind"]) == (_NAMES, "onnx", "fp32", "routing")
    assert facts["ratio"] <= 0.7
    assert facts["counts"] == [list(dge_models.set_fixed_queries(_loaded(routed), 0.7).counts[0])]
    assert facts["against_pytorch"]["largest_difference"] <= facts["against_pytorch"]["tolerance"]
    assert facts["against_pytorch"]["batch_difference"] <= 1e-4
    assert facts["against_dense"]["cosine"] < 1
    assert [(row["batch"], row["threads"], set(row["seconds"])) for row in facts["timings"]] == [
        (1, 1, {"exported", "dense"}),
        (8, 1, {"exported", "dense"}),
    ]
    assert facts["timings"][0]["implied"] == pytest.approx(1 / facts["ratio"])
    assert (facts["torch"], facts["onnxruntime"]) == (version("torch"), version("onnxruntime"))
    assert facts["command"].startswith(f"dge-export {routed} --to onnx")


def _loaded(folder: Path) -> nn.Module:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _told(command: Callable[..., Any], script: Path, *arguments: str) -> dict[str, list[str]]:
    result = command("-c", _ALONE, str(script), *arguments)
    assert result.returncode == 0, result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    return {path: rest for path, *rest in lines}


def test_the_loader_alone_classifies_as_evaluation_does(
    served: Path, routed: Path, data: Path, command: Callable[..., Any]
) -> None:
    told = _told(command, served / "classify.py", str(data / "val"))
    settings = [f"data.root={data}", "data.workers=0", "data.num_classes=null", "eval.timing_rounds=0"]
    target = find_target(str(routed), None, settings)
    images = HeldOutImages(open_source(target.config.data, "val"), target.config.data, data)  # type: ignore[arg-type]
    model = _loaded(routed)
    with torch.no_grad():
        expected = {images.source.name(i): int(model(images[i][0][None]).argmax()) for i in range(len(images))}
    assert told == {name: [str(best), _NAMES[best]] for name, best in expected.items()}
    assert len(set(expected.values())) > 1
    right = sum(Path(path).relative_to(data / "val").parts[0] == name for path, (_, name) in told.items())
    report = evaluate_checkpoint(target)
    assert report["acc1"] == pytest.approx(100 * right / len(told))
    first = next(iter(told))
    assert _told(command, served / "classify.py", first) == {first: told[first]}


def test_the_loader_goes_on_after_a_file_that_is_no_picture(
    served: Path, data: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    draw_pictures(tmp_path, 1)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture")
    result = command("-c", _ALONE, str(served / "classify.py"), str(tmp_path))
    assert result.returncode == 1
    assert "bad.png cannot be read" in result.stderr
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [str(tmp_path / "0.png")]


def _unwritten(monkeypatch: pytest.MonkeyPatch, wrong: bool = False) -> list[dict[str, Any]]:
    """Have PyTorch itself stand for the runtime: exporters take seconds."""
    asked: list[dict[str, Any]] = []
    models: dict[str, nn.Module] = {}

    def write(model: nn.Module, images: torch.Tensor, path: Path, **settings: Any) -> None:
        asked.append({"shape": tuple(images.shape), **settings})
        path.write_bytes(b"")
        models["last"] = model

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return models["last"](images) + wrong

    monkeypatch.setattr("dge_models.export.write_exported", write)
    monkeypatch.setattr("dge_models.export.open_exported", lambda path: run)
    return asked


def test_a_fixed_batch_a_ratio_and_another_precision(
    routed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = _unwritten(monkeypatch)
    out = tmp_path / "out"
    options = ["--ratio", "0.8", "--batch", "4", "--precision", "int8", "--rounds", "0", "--limit", "5"]
    assert main([str(routed), "--to", "onnx", "--images", str(data), "--output", str(out), *options]) == 0
    assert asked == [{"shape": (4, 3, 64, 64), "to": "onnx", "precision": "int8", "dynamic_batch": False}]
    facts = json.loads((out / "model.json").read_text(encoding="utf-8"))
    assert (facts["asked_ratio"], facts["timings"], facts["pictures"]["calibration"]) == (0.8, [], 5)
    assert facts["ratio"] == pytest.approx(0.8, abs=0.05)
    assert f"MAC ratio {facts['ratio']:.3f} of every image" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dense", "merging"])
def test_models_that_do_not_route(kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _unwritten(monkeypatch)
    model: nn.Module = _stirred()
    if kind == "merging":
        model = dge_models.merge_tokens(model, 0.8, [torch.randn(6, 3, 64, 64)])
    dge_models.save_pretrained(model, tmp_path / "m")
    options = ["--to", "onnx", "--images", str(data), "--rounds", "0", "--output", str(tmp_path / "out")]
    assert main([str(tmp_path / "m"), *options]) == 0
    facts = json.loads((tmp_path / "out" / "model.json").read_text(encoding="utf-8"))
    assert (facts["kind"], len(facts["counts"]), facts["ratio"] == 1) == (kind, kind == "merging", kind == "dense")
    assert len(asked) == 1


def test_a_model_without_classes_prints_its_features(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _unwritten(monkeypatch)
    dge_models.save_pretrained(_stirred(0), tmp_path / "m")
    options = ["--to", "onnx", "--images", str(data), "--rounds", "0", "--output", str(tmp_path / "out")]
    assert main([str(tmp_path / "m"), *options]) == 0
    script = (tmp_path / "out" / "classify.py").read_text(encoding="utf-8")
    assert "row.tolist()" in script
    assert "argmax" not in script


def test_a_failed_check_leaves_nothing_behind(
    routed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _unwritten(monkeypatch, wrong=True)
    out = tmp_path / "out"
    assert main([str(routed), "--to", "onnx", "--images", str(data), "--output", str(out)]) == 1
    assert re.search(r"error: model \S+ cannot be exported to onnx: .* differs from PyTorch's", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_mistakes(
    routed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _unwritten(monkeypatch)
    (tmp_path / "empty").mkdir()
    draw_pictures(tmp_path / "bad", 3)
    for number in range(30):
        (tmp_path / "bad" / f"bad{number}.png").write_bytes(b"no picture")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    dge_models.save_pretrained(_stirred(), tmp_path / "dense")
    good = [str(routed), "--to", "onnx", "--images", str(data), "--output", str(tmp_path / "out")]
    for options, words in (
        (["--ratio", "1.5"], "--ratio 1.5: expected a MAC ratio above 0 and at most 1"),
        (["--ratio", "0.01"], "ratio: got 0.01; expected at least"),
        (["--batch", "many"], "--batch many: expected a number of pictures, or dynamic"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--limit", "0"], "--limit 0: expected at least 1"),
        (["--rounds", "-1"], "--rounds -1: expected at least 0"),
        (["--image-size", "0"], "--image-size 0: expected at least 1"),
        (["--precision", "fp16"], "precision: got 'fp16' for onnx; expected fp32 or int8 for onnx"),
        (["--to", "pt2", "--batch", "dynamic"], "batch: got a dynamic one for pt2"),
        (["--images", str(tmp_path / "gone")], "gone does not exist; expected a folder of pictures"),
        (["--images", str(tmp_path / "empty")], "empty holds no picture that Pillow opens"),
        (["--images", str(tmp_path / "bad")], "cannot be read as an image"),
        (["--output", str(tmp_path / "taken")], "taken exists; expected the name of a new folder"),
        (["data.foo=1"], "unknown key"),
    ):
        capsys.readouterr()
        assert main([*good, *options]) == 1, options
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
        assert len(errors) == 1, errors
        assert errors[0].startswith("dge-export: error: ")
        assert words in errors[0]
    assert main([str(tmp_path / "dense"), *good[1:], "--ratio", "0.5"]) == 1
    assert "neither routes nor merges; expected 1, or a model" in (error := capsys.readouterr().err)
    assert "; dge-compress makes a cheaper one of a dense model" in error
    with pytest.raises(SystemExit):
        main([*good, "--to", "tflite"])
    assert "invalid choice: 'tflite'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_installed(
    routed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("to: 'openvino' needs openvino, which is not installed: pip install openvino")

    monkeypatch.setattr(engine.dge_models, "export_format", missing)
    out = tmp_path / "out"
    assert main([str(routed), "--to", "openvino", "--images", str(data), "--output", str(out)]) == 1
    assert capsys.readouterr().err.endswith("not installed: pip install openvino\n")
    assert not out.exists()


def test_help_answers_without_pytorch(command: Callable[..., Any]) -> None:
    program = "import sys, dge_recipes.commands.export as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    result = command("-c", f"{program}print('torch' in sys.modules, 'timm' in sys.modules)")
    assert result.stdout.endswith("False False\n")
    assert "usage: dge-export" in command("-m", "dge_recipes.export", "--help").stdout
