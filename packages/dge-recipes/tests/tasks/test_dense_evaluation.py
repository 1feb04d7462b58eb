"""What comes after a run: the same numbers on any number of processes, pictures, and the speed beside its twin's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dense_recipes import dense_config
from launching import launch
from PIL import Image

from dge_recipes.benchmark import main as benchmark
from dge_recipes.convert import main as convert
from dge_recipes.evaluate import main
from dge_recipes.train import train
from dge_recipes.visualize import main as visualize

SPEED = {"images_per_second", "num_processes", "distributed"}
RUNS = {"mask_rcnn": "pyramid", "semantic_fpn": "vit"}

EVALUATE_ALL = """
import sys
from pathlib import Path
from dge_recipes.evaluate import evaluate_checkpoint
from dge_recipes.evaluation.target import find_target
from dge_recipes.processes import end_processes

for run, report in zip(sys.argv[1::2], sys.argv[2::2]):
    evaluate_checkpoint(find_target(run, None, ()), output=Path(report), tell=print)
end_processes()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one epoch, by one process."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, model in RUNS.items():
        train(dense_config(kind, folder / kind, "train.epochs=1", model=model))
    return {kind: folder / kind for kind in RUNS}


@pytest.fixture(params=RUNS)
def trained(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Path:
    """One of them."""
    return runs[request.param]


def test_two_processes_find_what_one_finds(
    command: Callable[..., Any], runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 10 images in batches of 4: of the second process's last batch everything is repeated.
    script = tmp_path / "evaluate_all.py"
    script.write_text(EVALUATE_ALL, encoding="utf-8")
    places = [each for kind, run in runs.items() for each in (str(run), str(tmp_path / kind))]
    again = command(*launch("torchrun", 2)[:-1], str(script), *places)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("10 images, 2 processes") == 2
    for kind, run in runs.items():
        assert main([str(run), "--json", str(tmp_path / "one.json")]) == 0
        one, two = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("one.json", kind))
        assert (one["num_processes"], two["num_processes"], one["images"]) == (1, 2, 10)
        assert {key: one[key] for key in one.keys() - SPEED} == {key: two[key] for key in two.keys() - SPEED}
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        shared = one.keys() & summary.keys() - SPEED - {"data", "seconds"}
        assert {key: one[key] for key in shared} == {key: summary[key] for key in shared}
        assert "| MACs | backbone | neck | head | together |" in capsys.readouterr().out


def test_pictures_show_what_was_found(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "photo.png"
    Image.effect_noise((90, 60), 80).convert("RGB").save(photo)
    pictures = tmp_path / "pictures"
    assert visualize([str(photo), "--checkpoint", str(trained), "--output", str(pictures), "--layers", "1,2"]) == 0
    with Image.open(pictures / "photo.png") as drawn:
        assert drawn.width > 2 * 384  # the image, and how finely it was looked at beside it
    found = "object" if trained.name == "mask_rcnn" else "classes, most pixels "
    told = capsys.readouterr().out
    assert "of the dense MACs, " in told
    assert found in told
    assert visualize([str(photo), "--checkpoint", str(trained), "--output", str(pictures), "--layers", "9"]) == 1
    assert "got layer 9, expected 1 to " in capsys.readouterr().err


def test_speed_is_that_beside_the_dense_twin(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "speed"
    options = ["--output", str(output), "--checkpoint", str(trained), "--rounds", "1", "--device", "cpu"]
    assert benchmark([*options, "--batches", "1,2"]) == 0
    found = json.loads((output / "benchmark.json").read_text(encoding="utf-8"))
    assert {(each["model"], each["batch"]) for each in found["measurements"]} == {
        (model, batch) for model in ("dense", "DGE") for batch in (1, 2)
    }
    assert 0 < found["mac_ratio"] <= 1
    assert benchmark([*options, "--batches", "11"]) == 1
    assert "--batches 11: expected at most 10" in capsys.readouterr().err
    assert benchmark([*options, "--ratio", "0.5"]) == 1
    assert "--ratio: is not for " in capsys.readouterr().err


def test_one_run_at_several_budgets(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "tradeoff.png"
    assert main([str(trained), "--budget", "0.9,1", "--plot", str(plot), "--json", str(report)]) == 0
    low, high = json.loads(report.read_text(encoding="utf-8"))["budgets"]
    assert low["calibrated"] <= 0.93
    assert low["backbone_mac_ratio"] < high["backbone_mac_ratio"] <= 1
    assert "| budget | MAC ratio | " in capsys.readouterr().out
    assert plot.is_file()


def test_a_detector_is_no_classifier(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert([str(trained), str(tmp_path / "weights.safetensors")]) == 1
    assert f"{trained} is of task=" in capsys.readouterr().err
    recipe = str(trained / "config.yaml")
    assert main(["deit_tiny_patch16_224", "--config", recipe]) == 1
    assert f"{recipe} is of task=" in capsys.readouterr().err
