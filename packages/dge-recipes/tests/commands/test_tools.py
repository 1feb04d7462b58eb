"""``dge-benchmark``, ``dge-visualize`` and ``dge-convert`` as a user types them."""

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from sample_images import picture

from dge_recipes import benchmark, convert, evaluate, visualize
from dge_recipes.config import load_config
from dge_recipes.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small: Sequence[str]) -> Path:
    folder = tmp_path_factory.mktemp("tools") / "run"
    train(load_config("digits", [*small, f"output.dir={folder}", "train.epochs=1"]))
    return folder


def _error(capsys: pytest.CaptureFixture[str], main: Callable[[Sequence[str]], int], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("tool", [benchmark, convert, evaluate, visualize])
def test_help_shows_whole_commands(tool: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tool.main(["--help"])  # type: ignore[attr-defined]
    assert end.value.code == 0
    assert len(re.findall(r"^  (dge-\w+|python -m dge_recipes\.\w+) ", capsys.readouterr().out, re.MULTILINE)) >= 3


def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", str(tmp_path / "out"), "--batches", "1,2", "--rounds", "2", "--device", "cpu"]
    assert benchmark.main([*options, "--compile", "--backend", "eager"]) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "benchmark.json").read_text(encoding="utf-8"))
    keys = {(each["model"], each["variant"], each["batch"]) for each in content["measurements"]}
    assert keys == {(m, v, b) for m in ("dense", "DGE") for v in ("eager", "compiled") for b in (1, 2)}
    assert content["mac_ratio"] == pytest.approx(0.5, abs=0.05)
    assert all(each["p50_ms"] <= each["p95_ms"] for each in content["measurements"])
    assert (
        (tmp_path / "out" / "benchmark.md").read_text(encoding="utf-8").strip().endswith(out.strip().splitlines()[-1])
    )
    assert f"| {1 / content['mac_ratio']:.2f}x |" in out
    with Image.open(tmp_path / "out" / "benchmark.png") as image:
        assert image.width > 500


def test_benchmark_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--batches", "1,x"], "expected whole numbers"),
        (["--rounds", "0"], "expected at least 1"),
        (["--model", "deit_tiny_patch16_256"], "has no routers"),
        (["--model", "deit_dge"], "no model is called"),
        (["--device", "toaster"], "--device toaster"),
        (["--device", "meta"], "--device meta: it computes nothing"),
        (["--threads", "0"], "--threads 0: expected at least 1"),
        (["--dense", "resnet18"], "--dense resnet18 cannot be compared"),
        (["--dense", "deit_tiny_patch16_224"], "--dense deit_tiny_patch16_224 cannot be compared on images of"),
        (["--compile", "--backend", "x"], "--backend x: torch.compile has none of that name; usual ones are"),
    ):
        assert words in _error(capsys, benchmark.main, "--output", str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_visualize(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in (1, 2):
        (photos / f"{number}.png").write_bytes(picture(90 * number))
    strange = os.fsdecode(b"strange_\xff.png")  # no UTF-8
    (photos / strange).write_bytes(picture(5))
    (photos / "notes.txt").touch()
    assert visualize.main([str(photos), "--checkpoint", str(run), "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.png", "2.png", "index.html", strange]
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == page.count(' alt="') == 3
    assert 'alt="1.png, and over it the regions' in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "strange_\\udcff.png" in page
    assert "of the dense MACs" in capsys.readouterr().out
    one = [str(photos / "1.png"), "--checkpoint", str(run), "--output", str(tmp_path / "one"), "--layers", "1"]
    assert visualize.main(one) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["1.png"]


def test_visualize_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.png").write_bytes(b"no image")
    (tmp_path / "good.png").write_bytes(picture(5))
    common = ["--checkpoint", str(run), "--output", str(tmp_path / "out")]
    for arguments, words in (
        ([str(tmp_path / "no.png")], "cannot be read as an image"),
        ([str(tmp_path / "gone.png")], "does not exist"),
        ([str(run)], "no images in"),
        ([str(tmp_path / "no.png"), "--layers", "x"], "expected whole numbers"),
        ([str(tmp_path / "no.png"), "--output", str(tmp_path)], "would replace the image"),
        ([str(tmp_path / "good.png"), "--layers", "2"], "got layer 2, expected 1 to 1"),
        ([str(tmp_path / "good.png"), "--set", "data.image_size=64"], "cannot take images of shape [1, 64, 64]"),
        ([str(tmp_path / "no.png"), "--output", str(tmp_path / "no.png")], "no.png is not a folder"),
    ):
        assert words in _error(capsys, visualize.main, *common, *arguments)
    assert not (tmp_path / "out").exists()


def test_convert(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "run.safetensors"
    assert convert.main([str(run), str(target)]) == 0
    with safe_open(target, "pt") as file:
        assert file.metadata()["model"] == "deit_dge_s124_tiny_patch16_256"
        assert file.get_tensor("head.weight").shape == (10, 16)
    (tmp_path / "other").touch()
    assert target.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert "exists: choose another name or add --overwrite" in _error(capsys, convert.main, str(run), str(target))
    assert convert.main([str(run), str(target), "--overwrite"]) == 0
    model = timm.create_model("deit_tiny_patch16_256", depth=1, num_classes=7)
    source, other = tmp_path / "x.pth", tmp_path / "x.safetensors"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(model="deit_tiny_patch16_256")}, source)
    assert convert.main([str(source), str(other), "depth=1"]) == 0
    with safe_open(other, "pt") as file:
        assert torch.equal(file.get_tensor("head.weight"), model.head.weight)
    assert "doesn't fit" in _error(capsys, convert.main, str(source), str(tmp_path / "y.safetensors"))
    torch.save(model.state_dict(), source)
    assert "add --model NAME" in _error(capsys, convert.main, str(source), str(tmp_path / "y.safetensors"))
    assert "must end in .safetensors" in _error(capsys, convert.main, str(source), str(tmp_path / "y.pth"))


def test_convert_to_a_folder_and_evaluate_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, plain = tmp_path / "digits", tmp_path / "digits.safetensors"
    assert convert.main([str(run), str(folder)]) == convert.main([str(run), str(plain)]) == 0
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    with safe_open(plain, "pt") as file:
        assert torch.equal(file.get_tensor("head.weight"), loaded.head.weight)
        assert file.metadata()["splits"] == "[4, 2, 1]"
        assert json.loads((folder / "config.json").read_text("utf-8"))["label_names"] == [str(n) for n in range(10)]
    checkpoint = sorted((run / "checkpoints").glob("step_*"))[-1]
    from_run = timm.create_model(f"local-dir:{checkpoint}", pretrained=True)
    assert torch.equal(from_run.head.weight, loaded.head.weight)
    results = []
    recipe = ["--config", "digits", "data.image_size=32", "data.digit_size=20", "eval.timing_rounds=0"]
    for source, more in ((run, []), (folder, recipe)):
        output = tmp_path / "result.json"
        assert evaluate.main([str(source), "--json", str(output), *more]) == 0
        report = json.loads(output.read_text("utf-8"))
        results.append([report[key] for key in ("acc1", "acc5", "images", "classes")])
    assert results[0] == results[1]
    assert "exists: choose another name" in _error(capsys, convert.main, str(run), str(folder))
    (folder / "mine.txt").touch()
    assert "holds mine.txt" in _error(capsys, convert.main, str(run), str(folder), "--overwrite")


def test_evaluate_at_several_budgets(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.png")]
    assert evaluate.main([str(run), "--budget", "0.8,1", *files]) == 0
    points = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["budgets"]
    assert [point["target"] for point in points] == [0.8, 1.0]
    assert points[0]["calibrated"] == pytest.approx(0.8, abs=0.02)
    assert points[0]["mac_ratio"] == pytest.approx(0.8, abs=0.08)
    assert points[1]["mac_ratio"] == 1.0
    assert "| 0.8 | " in capsys.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert "--budget 0.01" in _error(capsys, evaluate.main, str(run), "--budget", "0.01")
    assert "expected MAC ratios" in _error(capsys, evaluate.main, str(run), "--budget", "2")
    assert "expected numbers" in _error(capsys, evaluate.main, str(run), "--budget", "half")
    assert "expected numbers" in _error(capsys, evaluate.main, str(run), "--budget", "0.5,")
    assert "must end in .png or .svg" in _error(capsys, evaluate.main, str(run), "--budget", "0.5", "--plot", "x.gif")
    assert "add --budget" in _error(capsys, evaluate.main, str(run), "--plot", "x.png")
