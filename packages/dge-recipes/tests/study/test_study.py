"""The study, made small: every row, resumable run by run, and a table of means over seeds."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dge_recipes.errors import UserError
from dge_recipes.study.__main__ import main
from dge_recipes.study.plan import VARIANTS, choose_variants, run_config
from dge_recipes.study.report import Finding, Mean, summarize, to_markdown


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
