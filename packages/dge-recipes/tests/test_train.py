"""Training from start to summary, and exact resume."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dge_recipes import train as recipe
from dge_recipes.config import Config, load_config
from dge_recipes.engine.reporting import Reporter
from dge_recipes.engine.run import Run
from dge_recipes.errors import UserError
from dge_recipes.train import train


def _metrics(config: Config) -> list[dict[str, Any]]:
    text = (Path(config.output.dir) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    clock = {"images_per_second", "data_share", "memory_mib"}
    return [{key: value for key, value in record.items() if key not in clock} for record in records]


def _last(config: Config) -> Path:
    return sorted((Path(config.output.dir) / "checkpoints").glob("step_*"))[-1]


def _equal_states(first: Path, second: Path) -> bool:
    assert first.name == second.name
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, two = load_file(first / name), load_file(second / name)
        if one.keys() != two.keys() or any(not one[key].equal(two[key]) for key in one):
            return False
    return True


def _stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the run, as far as it can tell, in the middle of a step."""
    original = Reporter.step

    def killed(reporter: Reporter) -> None:
        original(reporter)
        if reporter._progress.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "step", killed)


def test_a_run_leaves_config_metrics_summary_events_and_checkpoints(small_config: Callable[..., Config]) -> None:
    config = small_config("train.ema_decay=0.9", "eval.timing_rounds=2")
    summary = train(config)
    folder = Path(config.output.dir)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
    ]
    assert list(folder.glob("tensorboard/**/events.*"))
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == summary
    assert (summary["images"], summary["num_processes"], summary["device"]) == (360, 1, "cpu")
    assert (summary["epochs"], summary["steps"]) == (2, 10)
    assert 0 < summary["mac_ratio"] <= 1
    assert summary["images_per_second"] > 0
    assert summary["ema"]["images"] == 360
    kinds = [(record["kind"], record["step"]) for record in _metrics(config)]
    assert kinds == [
        *(("train", step) for step in (2, 4, 5)),
        ("eval", 5),
        ("ema", 5),
        *(("train", step) for step in (6, 8, 10)),
        ("eval", 10),
        ("ema", 10),
    ]
    losses = {"loss", "task", "distillation", "budget", "mac_ratio", "accuracy", "split_shares"}
    timing = {"images_per_second", "data_share", "memory_mib"}
    first = _metrics(config)[0]
    assert set(first) == {"kind", "step", "epoch", "lr"} | losses | timing
    assert 0 <= first["data_share"] <= 1
    assert first["memory_mib"] > 50
    (shares,) = first["split_shares"]  # of the one layer
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert shares[0] > 0.8  # routers start at the finest split


def test_the_table_row_is_printed(small_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]) -> None:
    train(small_config(name="digits_dense"))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "| model | Acc@1 | Acc@5 | mean MACs | images/s |"
    assert out[2].startswith("| deit_tiny_patch16_224 |")
    assert out[2].endswith("| not measured |")


def test_training_learns(small_config: Callable[..., Config]) -> None:
    config = small_config("train.epochs=6", "train.batch_size=32", "model.kwargs.embed_dim=32", name="digits_dense")
    train(config)
    losses = [record["loss"] for record in _metrics(config) if record["kind"] == "train"]
    assert losses[0] > 2.2
    assert losses[-1] < 1.9


def test_two_runs_of_one_seed_are_equal_and_of_another_differ(small_config: Callable[..., Config]) -> None:
    configs = [small_config(f"train.seed={seed}", output=name) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    for config in configs:
        train(config)
    first, second, third = (_without_clock(_metrics(config)) for config in configs)
    assert first == second
    assert first != third


def test_accumulation_equals_a_larger_batch(small_config: Callable[..., Config]) -> None:
    rates, weights = [], []
    for batch_size, steps in ((240, 1), (60, 4)):
        splits = (f"train.batch_size={batch_size}", f"train.accumulation_steps={steps}", "train.log_every=1")
        # SGD, because it is linear in the gradient: others blow a rounding error up where a gradient is near zero.
        config = small_config(*splits, "optim.name=sgd", name="digits_dense", output=str(batch_size))
        train(config)
        rates.append([(record["step"], record["lr"]) for record in _metrics(config) if record["kind"] == "train"])
        weights.append(load_file(_last(config) / "model.safetensors"))
    assert rates[0] == rates[1]
    assert len(rates[0]) == 10
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)


def test_the_imagenet_recipe_made_small(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in range(3):
            folder = tmp_path / "data" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (40, 50), (80 * label, 40 * number, 9)).save(folder / f"{number}.png")
    small = ("model.kwargs.img_size=64", "model.kwargs.depth=1", "data.image_size=64", "data.workers=0")
    short = (
        "train.epochs=2",
        "train.batch_size=6",
        "schedule.warmup_epochs=1",
        "optim.lr_batch=null",
        "data.num_classes=null",
    )
    places = (f"data.root={tmp_path / 'data'}", f"output.dir={tmp_path / 'run'}", "eval.timing_rounds=0")
    summary = train(load_config("deit_dge_tiny_256", [*small, *short, *places]))
    assert (summary["images"], summary["steps"]) == (18, 6)
    assert (summary["acc5"], summary["ema"]["images"]) == (100.0, 18)


@pytest.mark.parametrize("step", [4, 7, 9])
def test_exact_resume(
    small_config: Callable[..., Config], stateful: Sequence[str], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    # Steps 1 to 10 in two epochs of 5; checkpoints after 3, 5, 6, 9 and 10.
    whole, stopped = small_config(*stateful, output="whole"), small_config(*stateful, output="stopped")
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _stop_at(step, patch)
        train(stopped)
    train(stopped, resume="auto")
    assert _equal_states(_last(whole), _last(stopped))
    assert _without_clock(_metrics(whole)) == _without_clock(_metrics(stopped))


def test_resume_falls_back_to_the_last_intact_checkpoint(
    small_config: Callable[..., Config],
    stateful: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, stopped = small_config(*stateful, output="whole"), small_config(*stateful, output="stopped")
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _stop_at(7, patch)
        train(stopped)
    newest = _last(stopped) / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        train(stopped, resume="auto")
    assert "step_00000006 is damaged (optimizer.safetensors has" in caplog.text
    assert _equal_states(_last(whole), _last(stopped))


def test_a_complete_run_resumed_only_evaluates(small_config: Callable[..., Config]) -> None:
    config = small_config()
    first = train(config)
    before = _last(config).stat().st_mtime_ns
    second = train(config, resume="auto")
    assert _last(config).stat().st_mtime_ns == before
    assert {key: first[key] for key in ("acc1", "macs", "steps")} == {
        key: second[key] for key in ("acc1", "macs", "steps")
    }


def test_resume_from_a_path_goes_on_in_another_folder(
    small_config: Callable[..., Config], stateful: Sequence[str]
) -> None:
    first = small_config(*stateful, output="first")
    train(first)
    middle = Path(first.output.dir) / "checkpoints" / "step_00000006"
    second = small_config(*stateful, output="second")
    train(second, resume=str(middle))
    assert _equal_states(_last(first), _last(second))


def test_the_best_checkpoint_is_kept(small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([30.0, 50.0, 40.0, 45.0])
    original = recipe.evaluate

    def scored(*arguments: Any, **options: Any) -> Any:
        from dataclasses import replace

        return replace(original(*arguments, **options), acc1=next(scores))

    monkeypatch.setattr(recipe, "evaluate", scored)
    config = small_config("train.epochs=4", "checkpoint.keep_last=1", "checkpoint.every_epochs=9")
    summary = train(config)
    folder = Path(config.output.dir) / "checkpoints"
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000010", "step_00000020"]
    assert json.loads((folder / "best.json").read_text(encoding="utf-8")) == {
        "checkpoint": "step_00000010",
        "score": 50.0,
    }
    assert (summary["acc1"], summary["best_acc1"]) == (45.0, 50.0)


def test_a_loss_that_is_not_finite_stops_the_run(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(run: Run, *arguments: Any) -> None:
        if run.progress.step == 3:
            run.model.head.weight.data.fill_(float("nan"))  # type: ignore[union-attr, operator]
        original(run, *arguments)

    original = recipe.forward_backward
    monkeypatch.setattr(recipe, "forward_backward", poisoned)
    with pytest.raises(UserError, match="the loss is not finite at step 4"):
        train(small_config())


def test_a_checkpoint_of_another_global_batch_cannot_continue(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    train(small_config())
    # Without the recorded config the checkpoint itself has to notice.
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(UserError, match="was trained with global_batch 240, this run has 120"):
        train(small_config("train.batch_size=120"), resume="auto")


def test_nothing_is_written_when_the_config_cannot_work(small_config: Callable[..., Config], tmp_path: Path) -> None:
    for override in ("model.name=deit_tinny", "train.batch_size=2000", "optim.name=best", "output.trackers=[mlflow]"):
        with pytest.raises(UserError):
            train(small_config(override))
    assert list(tmp_path.iterdir()) == []
