"""A routed copy learns from the dense model on a folder of pictures, in the same training loop as classifiers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from launching import launch
from safetensors.torch import load_file
from small_models import draw_pictures, save_model, small_vit
from torch import nn

import dge_models
from dge_recipes.compress.fidelity import measure_fidelity
from dge_recipes.config import Config, dump_config
from dge_recipes.config.loading import build_config, parse_yaml
from dge_recipes.convert import convert
from dge_recipes.dry_run import dry_run
from dge_recipes.engine.fitted_routers import FittedRouters
from dge_recipes.engine.reporting import Reporter
from dge_recipes.errors import UserError
from dge_recipes.evaluate import main as evaluate
from dge_recipes.tasks import task_of
from dge_recipes.train import train

_CLOCK = {"images_per_second", "data_share", "memory_mib"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures, five of them held out."""
    return draw_pictures(tmp_path_factory.mktemp("photos"), 24)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """A classifier of five classes, and a model without any."""
    return {count: save_model(tmp_path_factory.mktemp("saved") / str(count), count) for count in (5, 0)}


def _tree(source: str, photos: Path, folder: Path) -> dict[str, Any]:
    return {
        "task": "distillation",
        "model": {"name": source, "convert": {"splits": [2, 1]}},
        "data": {
            **{"name": "pictures", "root": str(photos), "held_out": 0.2, "image_size": 64, "crop_pct": 1.0},
            **{"mean": [0.5] * 3, "std": [0.5] * 3, "auto_augment": None, "random_erasing": 0.0, "workers": 0},
            "crops": 2,
        },
        "optim": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.0},
        "schedule": {"min_lr": 0.0},
        "budget": {"kind": "set", "target": 0.6},
        "student": {"pictures": 16},
        "train": {"epochs": 2, "batch_size": 8, "log_every": 1, "device": "cpu"},
        "eval": {"batch_size": 2, "timing_rounds": 0},
        "output": {"dir": str(folder), "trackers": []},
    }


@pytest.fixture
def recipe(saved: dict[int, str], photos: Path, tmp_path: Path) -> Callable[..., Config]:
    """A recipe of 4 steps in an epoch, with ``section.key=value`` applied."""

    def build(*overrides: str, classes: int = 5, run: str = "run") -> Config:
        tree = _tree(saved[classes], photos, tmp_path / run)
        for override in overrides:
            key, _, value = override.partition("=")
            *sections, leaf = key.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[leaf] = parse_yaml(value, override)
        return build_config(tree)

    return build


def _records(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = (Path(config.output.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [{key: value for key, value in json.loads(line).items() if key not in _CLOCK} for line in lines]
    return [record for record in records if record["kind"] == kind]


def _checkpoint(config: Config, number: int = -1) -> Path:
    return sorted((Path(config.output.dir) / "checkpoints").glob("step_*"))[number]


@pytest.mark.parametrize("classes", [5, 0])
def test_a_run_comes_closer_to_the_dense_model_and_keeps_the_ratio(
    recipe: Callable[..., Config],
    classes: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = FittedRouters.fit

    def fit_and_spoil(routers: FittedRouters, model: nn.Module) -> None:
        fit(routers, model)
        torch.manual_seed(0)
        with torch.no_grad():  # what biases can mend, so that there is something to learn in seconds
            for block in model.blocks:  # type: ignore[union-attr]
                block.mlp.fc2.bias.add_(torch.randn(48), alpha=0.1)  # type: ignore[operator, union-attr]

    monkeypatch.setattr(FittedRouters, "fit", fit_and_spoil)
    config = recipe("train.epochs=6", "data.crops=4", "train.eval_every=3", "checkpoint.keep_last=99", classes=classes)
    summary = train(config)
    told, losses, found = capsys.readouterr(), _records(config, "train"), _records(config, "eval")
    assert sum(each["loss"] for each in losses[-8:]) < 0.7 * sum(each["loss"] for each in losses[:8])
    assert [each["epoch"] for each in found] == [0, 3, 6]  # what it starts from is judged too
    assert 1 - summary["fidelity"] < 0.7 * (1 - found[0]["fidelity"])
    assert summary["best_fidelity"] == max(each["fidelity"] for each in found)
    assert all(abs(each["mac_ratio"] - 0.6) < 0.1 for each in found)  # on five pictures that it was not set on
    assert (summary["images"], summary["unreadable"], summary["steps"]) == (5, 0, 54)
    assert (summary["agreement"] is None) == (classes == 0)
    assert "| model | MAC ratio | fidelity | class cosine | token cosine |" in told.out
    assert (tmp_path / "run" / "curve.png").stat().st_size > 5000
    start, end = (
        load_file(_checkpoint(config, 0) / "model.safetensors"),
        load_file(_checkpoint(config) / "model.safetensors"),
    )
    changed = {name for name, value in end.items() if not value.equal(start[name])}
    assert "norm.weight" in changed
    assert all(start[name].ndim == 1 for name in changed)
    assert not any(name.endswith("gate.weight") for name in changed)


def test_the_run_is_used_as_any_other(
    recipe: Callable[..., Config], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for classes in (5, 0):
        config = recipe("train.epochs=1", classes=classes, run=str(classes))
        summary, run = train(config), tmp_path / str(classes)
        assert evaluate([str(run), "--json", str(tmp_path / "found.json"), "eval.batch_size=3"]) == 0
        again = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
        for name in ("class_cosine", "token_cosine", "mac_ratio"):
            assert again[name] == pytest.approx(summary[name], abs=1e-6)
        convert(str(run), tmp_path / f"folder{classes}")
        student = timm.create_model(f"local-dir:{tmp_path / f'folder{classes}'}", pretrained=True).eval()
        assert student.num_classes == classes
        images = torch.stack([task_of(config).build_held_out(config, None, "").loader.dataset[k][0] for k in range(5)])
        kept = measure_fidelity(small_vit(classes), {"": student}, [images], torch.device("cpu"))[""]
        assert kept.class_cosine == pytest.approx(summary["class_cosine"], abs=1e-6)
        loaded = timm.create_model(f"local-dir:{_checkpoint(config)}", pretrained=True)  # as it is in the run
        assert all(value.equal(loaded.state_dict()[name]) for name, value in student.state_dict().items())
    assert "| budget |" not in capsys.readouterr().out
    plot = ["--budget", "0.5,0.8", "--plot", str(tmp_path / "plot.png")]
    assert evaluate([str(run), *plot]) == 0
    assert "| 0.5 | 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.ema_decay=0.9", "student.train=all"),
        ("budget.kind=controller", "train.accumulation_steps=2", "train.batch_size=4", "optim.weight_decay=0.01"),
    ],
    ids=["kept", "controller"],
)
def test_exact_resume(recipe: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str]) -> None:
    saving = ("checkpoint.every_steps=3", "checkpoint.keep_last=99")
    whole, stopped = (recipe(*overrides, *saving, run=name) for name in ("whole", "stopped"))
    train(whole)
    original = Reporter.step

    def killed(reporter: Reporter) -> None:
        original(reporter)
        if reporter._progress.step == 7:  # in the middle of the second epoch, a step after a checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Reporter, "step", killed)
        train(stopped)
    train(stopped, resume="auto")
    assert _checkpoint(whole).name == _checkpoint(stopped).name == "step_00000008"
    for path in _checkpoint(whole).glob("*.safetensors"):
        first, second = load_file(path), load_file(_checkpoint(stopped) / path.name)
        assert first.keys() == second.keys()
        assert [key for key in first if not first[key].equal(second[key])] == []
    for kind in ("train", "eval", "ema"):
        assert _records(whole, kind) == _records(stopped, kind)


def test_what_is_stopped_in_an_evaluation_evaluates_the_same_again(
    recipe: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is set anew from the fitted routers, not from where the stopped evaluation left them."""
    config = recipe("train.epochs=1", "optim.lr=0.05")
    settle, found = FittedRouters.settle, []

    def twice(routers: FittedRouters, model: nn.Module, kept: Any) -> None:
        for _ in range(2):
            settle(routers, model, kept)
            gates = [module.gate for module in model.modules() if isinstance(module, dge_models.Router)]
            found.append([gate.bias.tolist() for gate in gates])

    monkeypatch.setattr(FittedRouters, "settle", twice)
    train(config)
    assert found[0] == found[1] != found[2]
    assert found[2] == found[3]


def test_two_processes_are_one(recipe: Callable[..., Config], command: Callable[..., Any], tmp_path: Path) -> None:
    one, two = recipe("train.epochs=1", run="one"), recipe("train.epochs=1", "train.batch_size=4", run="two")
    train(one)
    path = tmp_path / "two.yaml"
    path.write_text(dump_config(two), encoding="utf-8")
    result = command(*launch("torchrun", 2), "dge_recipes.train", "--config", str(path))
    assert result.returncode == 0, result.stderr
    start, both = (load_file(_checkpoint(config, 0) / "model.safetensors") for config in (one, two))
    assert all(value.equal(both[name]) for name, value in start.items())  # fitted by one, and the same in both
    first, second = _records(one, "eval"), _records(two, "eval")
    assert first[0] == second[0]
    assert first[1]["fidelity"] == pytest.approx(second[1]["fidelity"], abs=1e-4)
    steps = [[each["loss"] for each in _records(config, "train")] for config in (one, two)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-3)


def test_routers_may_learn_at_random_budgets(recipe: Callable[..., Config]) -> None:
    config = recipe("budget.kind=random", "budget.target=0.5", "model.training_mode=sparse")
    summary = train(config)
    start, end = (load_file(_checkpoint(config, place) / "model.safetensors") for place in (0, -1))
    assert not start["blocks.0.router.gate.weight"].equal(end["blocks.0.router.gate.weight"])
    assert summary["steps"] == 8


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.convert=null"], r"model\.convert: got null with task=distillation, expected the splits"),
        (["model.kwargs.pretrained=true"], r"model\.kwargs\.pretrained: got it with task=distillation"),
        (["mixing.mixup=0.8"], "mixing: is for classification; got it with task=distillation"),
        (["distillation.kind=soft"], "distillation: is for classification; got it with task=distillation"),
        (["train.label_smoothing=0.1"], r"train\.label_smoothing: is for classification"),
        (["data.classes=new"], r"data\.classes: is for classification"),
        (["data.num_classes=5"], r"data\.num_classes: is for classification and detection and segmentation; got it"),
        (["head.kind=upernet"], "head: is for detection and segmentation; got it with task=distillation"),
        (["train.shard=true"], r"train\.shard=true is for classification"),
        (["train.compile=inductor"], r"train\.compile: got inductor with task=distillation"),
        (["budget.rate=0.1"], r"budget\.rate is no option of budget\.kind=set"),
        (["budget.high=0.9"], r"budget\.high is no option of budget\.kind=set"),
        (["data.crop_scale=[0.9, 0.5]"], r"data\.crop_scale: got \[0\.9, 0\.5\], expected the smallest share first"),
        (["task=classification"], "data.name=pictures serves distillation; got task=classification"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: Callable[..., Config], overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe(*overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.mean=[0.4, 0.5, 0.5]"], r"data\.mean: got \[0\.4, 0\.5, 0\.5\], expected \[0\.5, 0\.5, 0\.5\], which"),
        (["train.batch_size=40"], "but the training set has 38; data.crops takes several of each picture"),
        (["budget.target=0.01"], r"budget\.target=0\.01 is out of reach"),
        (["model.name=dge_vit"], "cannot be created"),
        (["model.name=deit_dge_s124_tiny_patch16_256"], "is converted already; expected a plain timm model"),
    ],
)
def test_what_is_found_out_later_is_told_before_any_training(
    recipe: Callable[..., Config], overrides: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        train(recipe(*overrides))
    assert not (tmp_path / "run").exists()


def test_weights_may_come_from_a_file(recipe: Callable[..., Config], tmp_path: Path) -> None:
    dense = small_vit(5)
    dge_models.save_pretrained(dense, tmp_path / "model", label_names=list("abcde"))
    shape = "{img_size: 64, patch_size: 8, embed_dim: 48, num_heads: 3, depth: 3}"
    source = f"model.init_from={tmp_path / 'model' / 'model.safetensors'}"
    config = recipe("model.name=vit_tiny_patch16_224", f"model.kwargs={shape}", source, "train.epochs=1")
    summary = train(config)
    assert summary["data"]["classes"] == list("abcde")
    assert summary["fidelity"] > 0.8
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        train(config, resume="auto")


def test_pictures_that_cannot_be_read(recipe: Callable[..., Config], tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "more", 30)
    for number in range(8):
        (photos / f"{number}.png" if number % 2 == 0 else photos / "below" / f"{number}.png").write_bytes(b"no picture")
    config = recipe(f"data.root={photos}", "data.unreadable=skip", "data.max_unreadable=0.9", "train.epochs=1")
    summary = train(config)
    assert summary["images"] + summary["unreadable"] == 6
    assert summary["unreadable_images"] == 8
    with pytest.raises(UserError, match="cannot be read as an image"):
        train(recipe(f"data.root={photos}", run="other"))


def test_dry_run(recipe: Callable[..., Config], tmp_path: Path) -> None:
    name = ["model.name=vit_tiny_patch16_224", "model.kwargs={img_size: 64, depth: 2}", "data.root=gone"]
    facts = dry_run(recipe(*name))
    told = "\n".join(facts["replaced"])
    assert "the weights of vit_tiny_patch16_224 are not looked for: starting from random ones" in told
    assert "random images of 64 x 64 instead" in told
    assert facts["loss"] > 0
    assert dry_run(recipe())["replaced"] == []
    assert not (tmp_path / "run").exists()


def test_the_recorded_recipe_is_read_back(recipe: Callable[..., Config]) -> None:
    config = recipe()
    tree = parse_yaml(dump_config(config), "dump")
    assert not {"mixing", "distillation", "head"} & set(tree)
    assert build_config(tree) == config
