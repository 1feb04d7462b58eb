"""Weights know the names of their classes, and every command that meets them with data compares these."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from folder_runs import folder_config, small_keys, write_lab
from safetensors.torch import load_file, save_file
from sample_images import picture
from torch.nn import functional as F
from torch.utils.data import default_collate

from dge_recipes import convert, evaluate, visualize
from dge_recipes import train as train_command
from dge_recipes.checkpoints.stored_classes import stored_classes
from dge_recipes.classes import Classes
from dge_recipes.config import dump_config, load_config
from dge_recipes.data.image_sets import plain_images
from dge_recipes.errors import UserError
from dge_recipes.evaluation.target import find_target
from dge_recipes.models import open_recipe
from dge_recipes.train import train


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folders called after their classes, a run on ants and bees, and one on three classes."""
    root = tmp_path_factory.mktemp("lab")
    write_lab(root)
    train(folder_config(root / "ant_bee_cat", root / "three", "train.epochs=1"))
    return root


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _report(*arguments: object) -> dict[str, Any]:
    assert evaluate.main([*map(str, arguments), "--json", "report.json"]) == 0
    content: dict[str, Any] = json.loads(Path("report.json").read_text(encoding="utf-8"))
    return content


def _error(capsys: pytest.CaptureFixture[str], main: Callable[[Sequence[str]], int], *arguments: object) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("source", ["run", "checkpoint", "copied", "averaged", "converted"])
def test_evaluation_on_other_classes(lab: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    newest = sorted((lab / "run" / "checkpoints").glob("step_*"))[-1]
    arguments = [lab / "run"] if source == "run" else [newest]
    if source in {"copied", "averaged"}:
        name = "model" if source == "copied" else "ema"
        shutil.copy(newest / f"{name}.safetensors", "bare.safetensors")
        arguments = [Path("bare.safetensors"), "--config", lab / "run" / "config.yaml"]
    if source == "converted":
        assert convert.main([str(lab / "run"), "bare.safetensors"]) == 0
        arguments = [Path("bare.safetensors"), "--config", lab / "run" / "config.yaml"]
    told = _error(capsys, evaluate.main, *arguments, f"data.root={lab / 'bee_cat'}")
    assert f"the weights {arguments[0]} know ant, bee; the held-out images of {lab / 'bee_cat'} show bee, cat" in told
    assert "(missing: ant; unknown: cat)" in told
    assert evaluate.main([*map(str, arguments)]) == 0


def test_evaluation_of_digits_on_a_folder(
    lab: Path, tmp_path: Path, small: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train(load_config("digits", [*small, f"output.dir={tmp_path / 'digits'}", "train.epochs=1"]))
    told = _error(capsys, evaluate.main, tmp_path / "digits", "--config", lab / "run" / "config.yaml")
    assert "know 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; the held-out images of" in told
    assert "show ant, bee (missing: 0, 1, 2" in told
    assert _report(tmp_path / "digits")["classes"] == list("0123456789")


def test_evaluation_on_a_subset(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bee = f"data.root={lab / 'bee'}"
    told = _error(capsys, evaluate.main, lab / "run", bee)
    assert told.endswith("(missing: ant); data.classes=subset evaluates among the shown classes alone\n")
    # A recipe that says how many classes there are is no reason for another error.
    told = _error(capsys, evaluate.main, lab / "run", bee, "data.num_classes=2")
    assert "(missing: ant); data.classes=subset" in told
    capsys.readouterr()
    report = _report(lab / "run", bee, "data.classes=subset", "data.num_classes=2")
    assert (report["acc1"], report["images"], report["num_classes"], report["classes"]) == (100.0, 4, 1, ["bee"])
    assert "4 images, 1 process, among 1 of 2 classes" in capsys.readouterr().out
    for more in ([], ["data.classes=subset"]):
        told = _error(capsys, evaluate.main, lab / "run", f"data.root={lab / 'ant_bee_cat'}", *more)
        assert told.endswith("show ant, bee, cat (unknown: cat)\n")


def test_accuracy_on_a_subset_is_that_of_its_outputs(lab: Path) -> None:
    whole = _report(lab / "three")
    part = _report(lab / "three", f"data.root={lab / 'bee_cat'}", "data.classes=subset")
    assert (whole["num_classes"], part["num_classes"], part["images"]) == (3, 2, 8)
    images = plain_images(folder_config(lab / "bee_cat", lab / "unused"), "val").images
    batch, labels = default_collate([images[index] for index in range(8)])
    with torch.no_grad():
        logits = open_recipe(load_config(str(lab / "three" / "config.yaml")).model, str(lab / "three"))(batch)[:, 1:]
    assert part["acc1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert part["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_budgets_on_a_subset(lab: Path) -> None:
    report = _report(lab / "three", f"data.root={lab / 'bee'}", "data.classes=subset", "--budget", "0.95,1")
    assert [(point["images"], point["acc1"], point["loss"]) for point in report["budgets"]] == [(4, 100.0, 0.0)] * 2


def test_a_run_whose_held_out_images_lack_a_class(lab: Path, tmp_path: Path) -> None:
    shutil.copytree(lab / "ant_bee_cat", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "ant")
    config = folder_config(tmp_path / "data", tmp_path / "run", "train.epochs=1")
    with pytest.raises(
        UserError, match=r"differ in \['ant'\] .*; data.classes=subset evaluates on those of val/ alone"
    ):
        train(config)
    subset = folder_config(tmp_path / "data", tmp_path / "run", "train.epochs=1", "data.classes=subset")
    summary = train(subset)
    assert (summary["images"], summary["data"]["classes"]) == (8, ["ant", "bee", "cat"])
    assert stored_classes(next((tmp_path / "run").glob("checkpoints/*/model.safetensors"))).count == 3  # type: ignore[union-attr]
    report = _report(tmp_path / "run")
    assert (report["acc1"], report["num_classes"]) == (summary["acc1"], 2)
    (tmp_path / "data" / "val" / "ant").mkdir()
    (tmp_path / "data" / "val" / "ant" / "0.png").write_bytes(picture(1))
    with pytest.raises(UserError, match=r"held-out images: their classes were bee, cat; are ant, bee, cat .*=accept"):
        train(subset, resume="auto")
    accepting = subset.model_copy(update={"data": subset.data.model_copy(update={"changed": "accept"})})
    assert train(accepting, resume="auto")["images"] == 9


def test_the_same_classes_in_another_order(lab: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    names = ["bee", "ant"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [(name, path.read_bytes()) for name in names for path in sorted((lab / "ant_bee/val" / name).iterdir())]
    columns = {"image": [{"bytes": each, "path": None} for _, each in rows], "label": [names.index(n) for n, _ in rows]}
    data = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(train=data, validation=data).save_to_disk(str(tmp_path / "rows"))
    recipe = tmp_path / "rows.yaml"
    config = folder_config(tmp_path / "rows", tmp_path / "hf", "data.name=huggingface")
    recipe.write_text(dump_config(config), encoding="utf-8")
    known, report = _report(lab / "run"), _report(lab / "run", "--config", recipe)
    assert {key: report[key] for key in ("acc1", "images")} == {key: known[key] for key in ("acc1", "images")}
    assert report["loss"] == pytest.approx(known["loss"])


def test_weights_without_names_are_not_compared(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = sorted((lab / "run" / "checkpoints").glob("step_*"))[-1]
    save_file(load_file(newest / "model.safetensors"), "old.safetensors", metadata={"format": "pt"})
    arguments = ["old.safetensors", "--config", lab / "run" / "config.yaml"]
    assert _report(*arguments)["acc1"] == _report(lab / "run")["acc1"]
    assert "8 images, 1 process, classes compared by number alone\n" in capsys.readouterr().out
    assert _report(*arguments, f"data.root={lab / 'bee_cat'}")["images"] == 8
    told = _error(capsys, evaluate.main, *arguments, f"data.root={lab / 'bee'}")
    assert told.endswith(f"know 2 classes without names; the held-out images of {lab / 'bee'} show 1 class (bee)\n")
    assert "reset_head" not in told
    told = _error(capsys, evaluate.main, *arguments, f"data.root={lab / 'bee'}", "data.classes=subset")
    assert "data.classes=subset finds classes by their names" in told
    assert convert.main(["old.safetensors", "new.safetensors", "--model", "vit_tiny_patch16_224"]) == 1


def test_a_model_of_timm_knows_its_own_classes(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=1, num_classes=2)
    folder = tmp_path / "saved"
    folder.mkdir()
    arguments = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 1}
    content = {"architecture": "vit_tiny_patch16_224", "num_classes": 2, "model_args": arguments}
    content["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 2}
    save_file(model.state_dict(), folder / "model.safetensors")
    recipe, name = ["--config", lab / "run" / "config.yaml"], f"local-dir:{folder}"
    for names in (["ant", "bee"], {"0": "ant", "1": "bee"}, None):
        (folder / "config.json").write_text(json.dumps({**content, "label_names": names}), encoding="utf-8")
        assert _report(name, *recipe)["num_classes"] == 2
        # Without names: a head of another size was replaced by a random one.
        told = _error(capsys, evaluate.main, name, *recipe, f"data.root={lab / 'ant_bee_cat'}")
        expected = "know 2 classes without names" if names is None else "know ant, bee"
        assert f"the weights {name} {expected}" in told
    (folder / "config.json").write_text(json.dumps({**content, "label_names": ["bee", "cat"]}), encoding="utf-8")
    told = _error(capsys, evaluate.main, name, *recipe)
    assert "(missing: cat; unknown: ant)" in told


def test_what_timm_saves_of_a_run_keeps_the_names(lab: Path) -> None:
    model = open_recipe(load_config(str(lab / "run" / "config.yaml")).model, str(lab / "run"))
    timm.models.save_for_hf(model, "saved")
    assert find_target("local-dir:saved", None, []).own_classes == Classes(2, ("ant", "bee"))


def test_conversion_keeps_the_names(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main([str(lab / "run"), "once.safetensors"]) == 0
    keys = [key.removeprefix("model.kwargs.") for key in small_keys(Path(), Path()) if key.startswith("model.kwargs.")]
    model = ["--model", "deit_dge_s124_tiny_patch16_256", *keys]
    assert convert.main(["once.safetensors", "twice.safetensors", *model]) == 0
    assert stored_classes(Path("once.safetensors")) == stored_classes(Path("twice.safetensors"))
    assert stored_classes(Path("once.safetensors")).names == ("ant", "bee")  # type: ignore[union-attr]


def test_drawings_name_their_guess(
    lab: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(lab / "ant_bee" / "val" / "bee" / "0.png")
    common = ["--checkpoint", str(lab / "run"), "--output", "pictures"]
    assert visualize.main([image, *common]) == 0
    assert "% of the dense MACs, class bee at " in capsys.readouterr().out
    assert visualize.main([str(lab / "ant_bee" / "val" / "ant"), *common]) == 0
    assert re.search("class (ant|bee) at ", Path("pictures/index.html").read_text(encoding="utf-8"))
    other = ["--set", f"data.root={lab / 'bee_cat'}"]
    told = _error(capsys, visualize.main, image, *common, *other)
    assert "know ant, bee; the held-out images of" in told
    assert "--set data.classes=new draws without comparing them" in told
    assert visualize.main([image, *common, *other, "--set", "data.classes=new"]) == 0
    assert visualize.main([image, *common, "--set", f"data.root={lab / 'bee'}", "--set", "data.classes=subset"]) == 0
    assert visualize.main([image, *common, "--set", "data.root=nowhere"]) == 0  # the images are all that it takes
    assert not caplog.records
    assert visualize.main([image, *common, "--set", f"data.root={lab / 'run'}"]) == 0
    assert "the recipe's classes are not compared" in caplog.text


def test_resuming_after_a_class_was_renamed(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(lab / "ant_bee", tmp_path / "data")
    keys = small_keys(tmp_path / "data", tmp_path / "run")
    command = ["--config", "deit_dge_tiny_256", *keys, "train.epochs=1"]
    assert train_command.main(command) == 0
    for part in ("train", "val"):
        (tmp_path / "data" / part / "bee").rename(tmp_path / "data" / part / "wasp")
    capsys.readouterr()
    assert train_command.main([*command, "--resume", "auto"]) == 1
    assert "were ant, bee; are ant, wasp (missing: bee; unknown: wasp)" in capsys.readouterr().err
