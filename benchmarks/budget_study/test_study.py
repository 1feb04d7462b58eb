"""The study, made small: every row, resumable run by run, and a table of means over seeds."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.budget_study import running
from benchmarks.budget_study.__main__ import main
from benchmarks.budget_study.plan import STUDIES, VARIANTS, choose_variants, run_config
from benchmarks.budget_study.report import Finding, Mean, summarize, to_markdown, write_study
from benchmarks.budget_study.time_limit import TimeLimit
from dge_recipes.engine.interruption import Halt, StopSignal
from dge_recipes.engine.reporting import Reporter
from dge_recipes.errors import RunStopped, UserError

SMALL_SHAPES = (
    "data.image_size=32",
    "data.num_classes=4",
    "data.num_images=80",
    "data.held_out_images=20",
    "data.workers=0",
    "model.kwargs={img_size: 32, patch_size: 4, embed_dim: 16, num_heads: 2, depth: 1}",
    "train.batch_size=16",
    "train.log_every=2",
    "eval.batch_size=16",
    "eval.timing_rounds=2",
)


def test_rows() -> None:
    names = [variant.name for variant in VARIANTS]
    assert len(names) == 9
    assert [each.name for each in choose_variants(["dge_loss_0.7"])] == ["dense", "dge_loss_0.7"]
    with pytest.raises(UserError, match=r"no row is called 'x'; expected some of dense, dense_longer, dge_loss_0\.4"):
        choose_variants(["x"])
    for variant in VARIANTS:
        config = run_config(Path("out"), variant, 2, epochs=5)
        assert (config.train.seed, config.train.epochs) == (2, 5)
        assert config.output.dir == f"out/runs/{variant.name}/seed_2"
        if variant.name == "dense_longer":  # the fair control: as many epochs in all, and no routers
            assert config.model.init_from == "out/runs/dense/seed_2"
            assert config.model.convert is None
        elif variant.name != "dense":
            assert config.model.init_from == "out/runs/dense/seed_2"
            assert config.budget.kind == variant.name.split("_")[1]
            assert variant.name.endswith(f"_{config.budget.target}") or config.budget.kind == "random"


def test_means() -> None:
    findings = [Finding("a", seed, acc, 0.5, 2e6) for seed, acc in ((0, 90.0), (1, 92.0), (2, 94.0))]
    findings.append(Finding("b", 0, 80.0, 1.0, 4e6))
    rows = summarize(findings)
    assert rows["a"]["acc1"] == Mean(92.0, 2.0)
    assert rows["b"]["acc1"] == Mean(80.0, None)
    lines = to_markdown(findings).splitlines()
    assert lines[2:] == ["| a | 92.00 ± 2.00 | 0.500 ± 0.000 | 2.00 ± 0.00 | 3 |", "| b | 80.00 | 1.000 | 4.00 | 1 |"]


def test_rows_of_the_shapes() -> None:
    study = STUDIES["shapes"]
    assert [each.name for each in study.variants] == [
        "dense",
        "dge_controller_0.5",
        "dense_longer",
        "dge_loss_0.5",
        "dge_random",
    ]
    with pytest.raises(UserError, match=r"no row is called 'dge_loss_0\.7'"):
        choose_variants(["dge_loss_0.7"], study)
    for variant in study.variants:
        config = run_config(Path("out"), variant, 0, study=study, timing=True)
        assert (config.data.name, config.data.image_size, config.eval.timing_rounds) == ("shapes", 256, 10)
        assert run_config(Path("out"), variant, 0, study=study).eval.timing_rounds == 0
        assert (config.model.convert is None) == variant.name.startswith("dense")


def test_times_are_shown_where_they_are_known(tmp_path: Path) -> None:
    old = {"row": "a", "seed": 0, "acc1": 90.0, "mac_ratio": 1.0, "macs": 4e6}  # as studies without times wrote them
    findings = [Finding(**old), Finding("b", 0, 88.0, 0.5, 2e6, 63.0, 800.4, 1500.0)]  # type: ignore[arg-type]
    assert to_markdown(findings).splitlines() == [
        "| model | Acc@1 (%) | MACs / dense | mean MACs (M) | training (s) | training images/s | inference images/s "
        "| runs |",
        "|---|---|---|---|---|---|---|---|",
        "| a | 90.00 | 1.000 | 4.00 | not measured | not measured | not measured | 1 |",
        "| b | 88.00 | 0.500 | 2.00 | 63 | 800 | 1500 | 1 |",
    ]
    content = write_study(tmp_path, "Letters", findings, {"device": "abacus"})
    assert json.loads((tmp_path / "study.json").read_text(encoding="utf-8")) == content
    assert list(content["rows"]["a"]) == ["acc1", "mac_ratio", "macs", "seeds"]
    assert content["rows"]["b"]["images_per_second"] == {"mean": 1500.0, "std": None}
    assert (tmp_path / "study.md").read_text(encoding="utf-8").startswith("# Letters\n\n- device: abacus\n\n| model |")
    assert (tmp_path / "study_speed.png").stat().st_size > 1000
    write_study(tmp_path / "untimed", "Letters", findings[:1], {})
    assert (tmp_path / "study_training.png").stat().st_size > 1000
    assert not list((tmp_path / "untimed").glob("study_*.png"))


def _shapes(output: Path, *options: str) -> list[str]:
    rows = ("--rows", "dge_controller_0.5", "--epochs", "2")
    return ["--data", "shapes", "--output", str(output), *rows, *options, *SMALL_SHAPES]


def test_a_small_study_of_shapes_cut_by_its_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits: list[TimeLimit] = []

    def remembered(minutes: float | None) -> TimeLimit:
        limits.append(TimeLimit(minutes))
        return limits[-1]

    original, steps = Reporter.step, iter(range(1, 100))

    def expiring(reporter: Reporter) -> None:
        original(reporter)
        if next(steps) == 10 + 3:  # in the second run
            limits[-1].expire()

    with monkeypatch.context() as patch:
        patch.setattr(running, "TimeLimit", remembered)
        patch.setattr(Reporter, "step", expiring)
        assert main(_shapes(tmp_path, "--minutes", "60")) == 0
    captured = capsys.readouterr()
    assert "the 60 minutes are over with 1 of 2 runs done; the same command continues" in captured.err
    assert list(json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))["rows"]) == ["dense"]
    saved = tmp_path / "runs" / "dge_controller_0.5" / "seed_0" / "checkpoints" / "step_00000003"
    assert saved.is_dir()
    assert main(_shapes(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "1/2 dense, seed 0: done before" in out
    content = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert (content["title"], content["machine"]["device"]) == ("Drawn shapes", "cpu")
    for row in ("dense", "dge_controller_0.5"):
        for name in ("seconds", "training_images_per_second", "images_per_second"):
            assert content["rows"][row][name]["mean"] > 0
    assert (tmp_path / "study_speed.png").stat().st_size > 1000
    assert "inference images/s" in out


def test_a_limit_that_is_over_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def late(config: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)  # between two runs
        return "never"

    monkeypatch.setattr(running, "_progress", late)
    assert main(_shapes(tmp_path)) == 0
    assert "stopped by SIGTERM between two runs; the same command continues" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunStopped, match="the 3 minutes are over with 0 of 2 runs done"):
        running._tell_end(3.0, 0, 2, RunStopped("so"))
    for minutes in ("0", "-1", "nan", "inf"):
        assert main(_shapes(tmp_path, "--minutes", minutes)) == 1
        assert "expected a number above 0" in capsys.readouterr().err


def test_the_time_limit_is_a_signal_at_its_time() -> None:
    with StopSignal() as stop, TimeLimit(1e-4) as limit:
        assert limit._timer is not None
        limit._timer.join(10)
    assert (stop.request, limit.over) == (Halt.SIGTERM, True)
    with StopSignal() as stop, TimeLimit(60) as limit:
        pass  # and none later
    assert limit._timer is not None
    assert not limit._timer.is_alive()
    assert (stop.request, limit.over) == (Halt.NONE, False)


def test_a_small_study_and_its_continuation(
    small: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "study"
    rows = "dge_controller_0.7,dge_random"
    arguments = ["--output", str(output), "--seeds", "0,1", "--epochs", "1", "--rows", rows, *small]
    assert main(arguments) == 0
    first = json.loads((output / "study.json").read_text(encoding="utf-8"))
    expected = ["dense", "dge_controller_0.7", *(f"dge_random_at_{budget}" for budget in (0.4, 0.5, 0.7))]
    assert list(first["rows"]) == expected
    assert all(len(row["seeds"]) == 2 for row in first["rows"].values())
    assert first["rows"]["dense"]["mac_ratio"]["mean"] == 1
    assert first["rows"]["dge_random_at_0.5"]["mac_ratio"]["mean"] == pytest.approx(0.5, abs=0.1)
    assert (output / "study.png").stat().st_size > 1000
    # One run is lost: it alone is repeated, and the result is the same.
    kept = output / "runs" / "dense" / "seed_1" / "summary.json"
    before = kept.stat().st_mtime_ns
    (output / "runs" / "dge_controller_0.7" / "seed_1" / "summary.json").unlink()
    capsys.readouterr()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("done before") == 5
    assert kept.stat().st_mtime_ns == before
    assert json.loads((output / "study.json").read_text(encoding="utf-8")) == first
    assert main([*arguments, "optim.lr=1e-3"]) == 1
    assert "holds a run of another configuration" in capsys.readouterr().err
