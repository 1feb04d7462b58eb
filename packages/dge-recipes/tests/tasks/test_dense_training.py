"""Detectors and segmenters in the same training loop: they learn, resume exactly, and leave what classifiers leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_recipes import dense_config, dense_tree
from safetensors import safe_open
from safetensors.torch import load_file

from dge_recipes.config import Config, load_config
from dge_recipes.config.loading import build_config
from dge_recipes.dry_run import dry_run
from dge_recipes.engine.losses import TrainingLosses
from dge_recipes.engine.reporting import Reporter
from dge_recipes.errors import UserError
from dge_recipes.tasks import task_of
from dge_recipes.train import train

STATEFUL = ("train.ema_decay=0.9", "train.accumulation_steps=2", "checkpoint.every_steps=3", "checkpoint.keep_last=99")


def _records(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = (Path(config.output.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clock = {"images_per_second", "data_share", "memory_mib"}
    records = [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]
    return [record for record in records if record["kind"] == kind]


def _weights(config: Config, name: str) -> dict[str, torch.Tensor]:
    return load_file(sorted((Path(config.output.dir) / "checkpoints").glob("step_*"))[-1] / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("kind", "model", "terms"),
    [
        ("retinanet", "pyramid", {"classification", "bbox_regression"}),
        ("mask_rcnn", "vit", {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}),
        ("semantic_fpn", "vit", {"pixel_accuracy"}),
        ("upernet", "pyramid", {"pixel_accuracy"}),
    ],
)
def test_a_run_learns_and_leaves_its_terms_and_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, model: str, terms: set[str]
) -> None:
    config = dense_config(kind, tmp_path / "run", "train.epochs=3", "eval.timing_rounds=1", model=model)
    summary = train(config)
    told = capsys.readouterr()
    records = _records(config, "train")
    own = set(records[0]) - {"kind", "step", "epoch", "lr", "loss", "task", "distillation"}
    own -= {"budget", "mac_ratio", "split_shares"}
    assert own == terms
    assert sum(record["task"] for record in records[-4:]) < 0.9 * sum(record["task"] for record in records[:4])
    task = task_of(config)
    assert (summary["images"], summary["steps"], summary["unreadable"]) == (10, 24, 0)
    assert summary[f"best_{task.score_name}"] >= summary[task.score_name] >= 0
    parts = summary["backbone_macs"] + summary["neck_macs"] + summary["head_macs"]
    assert summary["macs"] == pytest.approx(parts)
    assert 0 < summary["backbone_mac_ratio"] <= 1
    assert summary["backbone_mac_ratio"] <= summary["mac_ratio"] <= 1
    assert summary["images_per_second"] > 0
    assert f"| {task.score_label.upper() if kind == 'retinanet' else ''}" in told.out
    assert "| MACs | backbone | neck | head | together |" in told.out
    assert f"{sorted(terms)[-1]} " in told.err
    assert load_config(str(tmp_path / "run" / "config.yaml")) == config


def _assert_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, *options: str, **model: str) -> None:
    """A run that is killed and resumed ends bit for bit like one that is not."""
    whole, stopped = (dense_config(kind, folder / name, *STATEFUL, *options, **model) for name in ("whole", "stopped"))
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
    for name in ("model", "ema", "optimizer"):
        first, second = _weights(whole, name), _weights(stopped, name)
        assert first.keys() == second.keys()
        assert [key for key in first if not first[key].equal(second[key])] == []
    for record in ("train", "eval", "ema"):
        assert _records(whole, record) == _records(stopped, record)


@pytest.mark.parametrize("options", [("retinanet", "head.short_sides=[48,56,64]"), ("semantic_fpn",)])
def test_exact_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    _assert_resumes(tmp_path, monkeypatch, *options)


@pytest.mark.parametrize(("kind", "model"), [("mask_rcnn", "pyramid"), ("semantic_fpn", "vit")])
def test_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: Callable[[], None], kind: str, model: str
) -> None:
    plain = dense_config(kind, tmp_path / "plain", "train.epochs=1", model=model)
    train(plain)
    fresh_accelerate()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    half = dense_config(kind, tmp_path / "half", "train.epochs=3", model=model)
    assert train(half)["mixed_precision"] == "bf16"
    losses, expected = ([record["task"] for record in _records(config, "train")] for config in (half, plain))
    assert losses[0] == pytest.approx(expected[0], rel=0.05)
    assert losses[0] != expected[0]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert {weight.dtype for weight in _weights(half, "model").values() if weight.is_floating_point()} == {
        torch.float32
    }
    _assert_resumes(tmp_path, monkeypatch, kind, model=model)


def test_upernet_begins_alike_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: Callable[[], None]
) -> None:
    """One epoch: on a CPU its convolutions take tens of seconds in bfloat16."""
    plain, half = (
        dense_config("upernet", tmp_path / name, "train.epochs=1", model="vit") for name in ("plain", "half")
    )
    train(plain)
    fresh_accelerate()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(half)["mixed_precision"] == "bf16"
    losses, expected = ([record["task"] for record in _records(config, "train")] for config in (half, plain))
    assert losses[0] == pytest.approx(expected[0], rel=0.05)
    assert losses[0] != expected[0]


@pytest.mark.parametrize(("kind", "saved"), [("retinanet", "images.0"), ("semantic_fpn", "images")])
def test_the_batch_of_a_broken_loss_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, saved: str
) -> None:
    config = dense_config(kind, tmp_path / "run")
    losses = type(task_of(config).build_losses(config, torch.nn.Identity()))
    original = losses.forward

    def poisoned(module: TrainingLosses, images: Any, *rest: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = original(module, images, *rest)
        return {**found, "loss": found["loss"] * float("nan")}

    monkeypatch.setattr(losses, "forward", poisoned)
    with pytest.raises(UserError, match="the loss is not finite at step 1 in process 0"):
        train(config)
    (file,) = (tmp_path / "run" / "bad_batches").iterdir()
    with safe_open(file, "pt") as content:
        names = set(content.keys())
        assert content.get_tensor(saved).shape[-2:] == (64, 64)
    assert {"targets.0.boxes", "targets.3.labels"} <= names if kind == "retinanet" else names == {"images", "targets"}


def test_a_dense_backbone_has_no_budget(tmp_path: Path) -> None:
    config = dense_config("retinanet", tmp_path / "run", "train.epochs=1", model="dense")
    summary = train(config)
    assert (summary["mac_ratio"], summary["backbone_mac_ratio"]) == (1.0, 1.0)
    assert {record["budget"] for record in _records(config, "train")} == {0.0}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.shard=true", "train.shard=true is for classification"),
        ("train.compile=eager", "train.compile: got eager .* compiling takes minutes"),
    ],
)
def test_what_is_not_proved_is_refused(tmp_path: Path, override: str, words: str) -> None:
    config = dense_config("retinanet", tmp_path, override)
    with pytest.raises(UserError, match=words):
        task_of(config).build_model(config, 3, (3, 64, 64))


@pytest.mark.parametrize(("kind", "data"), [("mask_rcnn", "coco"), ("upernet", "segmentation_folder")])
def test_absent_data_are_drawn_for_a_dry_run(tmp_path: Path, kind: str, data: str) -> None:
    tree = dense_tree(kind, tmp_path / "run")
    tree["data"] = {"name": data, "root": str(tmp_path / "none"), "image_size": 64, "num_classes": 4}
    facts = dry_run(build_config(tree))
    assert facts["loss"] > 0
    assert (facts["images"], list(tmp_path.iterdir())) == ((3, 64, 64), [])
    assert "drawn scenes of 64 x 64 in 5 classes instead" in facts["replaced"][0]
