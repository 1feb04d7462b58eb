"""``dge-benchmark --peers`` as a user types it."""

import json
from pathlib import Path

import pytest
from PIL import Image
from small_models import draw_pictures, save_model

from dge_recipes.commands.benchmark import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("photos"), 8)


def test_methods_side_by_side(model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--peers", "--model", model, "--images", str(photos), "--ratios", "0.8", "--batches", "1,2"]
    assert main([*options, "--rounds", "2", "--device", "cpu", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "peers.json").read_text(encoding="utf-8"))
    assert report["command"].startswith(f"dge-benchmark --peers --model {model}")
    assert (report["calibration_pictures"], report["pictures"]) == (4, 4)
    assert report["routers_fitted_on"] == 64  # with crops
    assert {each["method"] for each in report["peers"]} >= {"merge, published", "merge, ragged"}
    timed = {(each["model"], each["batch"]) for each in report["measurements"]}
    assert timed == {(name, batch) for name in ("dense", *_names(report)) for batch in (1, 2)}
    for each in report["peers"]:
        found = each["fidelity"]
        assert f"| {each['method']} | {found['mac_ratio']:.3f} | {found['class_cosine']:.4f} |" in printed
    assert (out / "peers.md").read_text(encoding="utf-8").strip().endswith(printed.strip())
    with Image.open(out / "peers.png") as image:
        assert image.width > 500


def _names(report: dict[str, list[dict[str, object]]]) -> list[str]:
    return [f"{each['method']} {each['asked']:g}" for each in report["peers"]]


def test_other_pictures_to_calibrate_on(model: str, photos: Path, tmp_path: Path) -> None:
    options = ["--peers", "--model", model, "--images", str(photos), "--calibration", str(photos), "--ratios", "0.8"]
    options += ["--batches", "1", "--rounds", "1", "--image-size", "96"]
    assert main([*options, "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "peers.json").read_text(encoding="utf-8"))
    assert (report["calibration_pictures"], report["pictures"], report["image_size"]) == (8, 8, 96)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--peers"], "--peers: expected --model NAME"),
        (["--peers", "--model", "MODEL"], "--peers: expected --images DIR"),
        (["--peers", "--model", "MODEL", "--images", "DIR", "--ratio", "0.5"], "--ratio: is not for --peers"),
        (
            ["--peers", "--model", "MODEL", "--images", "DIR", "--ratios", "0.5,1"],
            "--ratios 0.5,1: expected MAC ratios",
        ),
        (
            ["--peers", "--model", "MODEL", "--images", "DIR", "--image-size", "0"],
            "--image-size 0: expected at least 1",
        ),
        (["--peers", "--model", "MODEL", "--images", "DIR", "--ratios", "0.01"], "no method gave a model: merge"),
        (["--images", "DIR"], "--images: is for --peers alone"),
    ],
)
def test_mistakes(
    options: list[str], words: str, model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"MODEL": model, "DIR": str(photos)}.get(option, option) for option in options]
    assert main([*given, "--device", "cpu", "--rounds", "1", "--output", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
