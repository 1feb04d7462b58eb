"""``dge-compress`` as a user types it."""

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from small_models import draw_pictures, save_model

import dge_models
from dge_recipes.commands.compress import main
from dge_recipes.compress import attempts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("photos"), 30)


def test_from_a_folder_of_pictures_to_a_model_that_timm_loads(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([model, "--images", str(photos), "--ratio", "0.7", "--output", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [each["method"] for each in report["results"]] == ["dense", "merge", "route"]
    assert (report["pictures"]["calibration"], report["pictures"]["held_out"]) == (27, 3)
    assert report["command"].startswith(f"dge-compress {model} --images ")
    assert (report["seed"], report["torch"]) == (0, version("torch"))
    for each in report["results"]:
        assert f"| {each['method']} | {each['mac_ratio']:.3f} | {each['class_cosine']:.4f} |" in printed.out
    assert f'timm.create_model("local-dir:{out}", pretrained=True)' in printed.out
    assert "merge: calibrating on 27 pictures" in printed.err
    loaded: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    chosen = next(each for each in report["results"] if each["method"] == report["chosen"])
    count = dge_models.count_macs(loaded, torch.randn(4, 3, 64, 64))
    assert (count.total < count.static_total).all()
    assert f"{chosen['mac_ratio']:.3f}"[:3] in (out / "README.md").read_text(encoding="utf-8")
    with Image.open(out / "granularity.png") as picture:
        assert picture.height > 3 * 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("method", ["merge", "route"])
def test_the_method_that_is_asked_for(method: str, model: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--method", method, "--image-size", "96", "--limit", "9", "--batch-size", "3", "--seed", "5"]
    assert main([model, "--images", str(photos), "--ratio", "0.8", "--output", str(out), *options]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (report["chosen"], report["image_size"], report["pictures"]["calibration"]) == (method, 96, 9)
    loaded: Any = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert loaded.patch_embed.img_size == (96, 96)
    assert isinstance(loaded, dge_models.RoutedModel) is (method == "route")


def test_distillation_takes_the_time_that_is_left(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "FITTED_ON", 0)  # routing leaves more of the few seconds
    out = tmp_path / "out"
    options = ["--method", "distill", "--minutes", "0.1"]
    assert main([model, "--images", str(photos), "--ratio", "0.7", "--output", str(out), *options]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [each["method"] for each in report["results"]] == ["dense", "route", "distill"]
    assert report["chosen"] == "distill"
    assert report["more"]["distill"]["pictures"] == 27
    assert report["more"]["distill"]["steps"] > 0
    before, after = (1 - each["class_cosine"] for each in report["results"][1:])
    assert after <= before
    assert report["seconds"] < 15
    loaded: Any = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert isinstance(loaded, dge_models.RoutedModel)


def test_mistakes(model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    draw_pictures(tmp_path / "one", 1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    good = [model, "--images", str(photos), "--ratio", "0.6", "--output", str(tmp_path / "out")]
    for options, words in (
        (["--ratio", "1.5"], "--ratio 1.5: expected a MAC ratio above 0 and below 1"),
        (["--ratio", "0.05"], "merge: ratio: got 0.05; expected one from"),
        (["--minutes", "0"], "--minutes 0: expected a number above 0"),
        (["--splits", "1,2"], "--splits 1,2: expected two or more numbers that fall"),
        (["--splits", "4,3,1"], "--splits 4,3,1: expected two or more numbers that fall"),
        (["--splits", "x"], "--splits 'x': expected whole numbers"),
        (["--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (["--image-size", "0"], "--image-size 0: expected at least 1"),
        (["--limit", "0"], "--limit 0: expected at least 1"),
        (["--seed", "-1"], "--seed -1: expected at least 0"),
        (["--device", "toaster"], "--device toaster"),
        (["--images", str(tmp_path / "gone")], "gone does not exist; expected a folder of pictures"),
        (["--images", str(tmp_path / "empty")], "empty holds no picture that Pillow opens; expected at least two"),
        (["--images", str(tmp_path / "one")], "one holds one picture; expected at least two"),
        (["--output", str(tmp_path / "taken")], "taken exists; expected the name of a new folder"),
        (["data.foo=1"], "unknown key"),
        (["exif=true"], "got 'exif=true'; expected data.key=value"),
    ):
        capsys.readouterr()
        assert main([*good, *options]) == 1, options
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
        assert len(errors) == 1, errors
        assert errors[0].startswith("dge-compress: error: ")
        assert words in errors[0]
    assert not (tmp_path / "out").exists()


def test_help_answers_without_pytorch(command: Callable[..., Any]) -> None:
    program = "import sys, dge_recipes.commands.compress as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    result = command("-c", f"{program}print('torch' in sys.modules, 'timm' in sys.modules)")
    assert result.stdout.endswith("False False\n")
    assert len(re.findall(r"^  dge-compress ", result.stdout, re.MULTILINE)) >= 3


def test_as_a_module(command: Callable[..., Any]) -> None:
    assert "usage: dge-compress" in command("-m", "dge_recipes.compress", "--help").stdout
