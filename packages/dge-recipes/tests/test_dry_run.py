"""Every shipped recipe builds and takes a training step, with or without its data."""

import re
from pathlib import Path

import pytest

from dge_recipes.config import list_configs, load_config
from dge_recipes.dry_run import dry_run
from dge_recipes.train import main

# The number of blocks is all that is changed: the largest models take minutes on a CPU, and their blocks are alike.
_PYRAMID = "model.kwargs.depths=[1, 1, 1, 1]"
_SHALLOW = {"deit": "model.kwargs.depth=1", "dpvt": _PYRAMID, "pvt": _PYRAMID, "vit": "model.kwargs.depth=1"}
# Parameters; heads are not made small.
_LARGEST = {"classification": 2e7, "detection": 5e7, "segmentation": 5e7, "distillation": 2e7}
# A copy is not far from a model; rounding may make the distance negative.
_LOSSES = {"classification": (1, 12), "distillation": (-1e-5, 1)}
# Fewer pixels: what necks and heads cost grows with their number.
_SMALL = {
    "detection": ["data.image_size=200", "head.short_side=200", "head.long_side=200"],
    "segmentation": ["data.image_size=128"],
}
_MADE_SMALL = ("digits", "scenes")
_SCENES = {f"scenes_{task}{twin}" for task in ("detection", "segmentation") for twin in ("", "_dense")}
_COMPLETE = {"digits", "digits_dense", "shapes_dense", *_SCENES}  # need neither data nor weights from elsewhere


@pytest.mark.parametrize("name", list_configs())
def test_shipped_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where none of the recipes' data is
    task, family = load_config(name).task, load_config(name).model.name.split("_")[0]
    small = [] if name.startswith(_MADE_SMALL) else [_SHALLOW[family], *_SMALL.get(task, [])]
    config = load_config(name, small)
    facts = dry_run(config)
    least, most = _LOSSES.get(task, (0.1, 12))
    assert least < facts["loss"] < most
    assert 0 < facts["parameters"] < _LARGEST[task]
    assert facts["images"][1:] == (config.data.image_size, config.data.image_size)
    assert bool(facts["replaced"]) == (name not in _COMPLETE)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shallow = ("model.kwargs.depth=1",)
    assert main(["--config", "deit_dge_tiny_distilled_256", "--dry-run", *shallow]) == 0
    captured = capsys.readouterr()
    assert re.match(r"deit_dge_tiny_distilled_256: \d\.\d\d M parameters, images 3 x 256 x 256, ", captured.out)
    told = [line for line in captured.err.splitlines() if line.startswith("dry run: ")]
    assert len(told) == 2
    assert "regnety_160.safetensors does not exist: going on without a teacher" in told[0]
    assert "random images of 256 x 256 in 1000 classes instead" in told[1]
    assert main(["--config", "digits", "--dry-run", "optim.name=best"]) == 1
    (tmp_path / "data" / "imagenet").mkdir(parents=True)  # there, but of no use: not to be replaced
    assert main(["--config", "deit_tiny_256", "--dry-run", *shallow]) == 1
    assert "imagenet/train does not exist" in capsys.readouterr().err
