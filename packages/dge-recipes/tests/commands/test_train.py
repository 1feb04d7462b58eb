"""``dge-train`` as a user types it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dge_recipes.config import list_configs, list_launchers
from dge_recipes.train import main


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_is_for_a_newcomer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for words in ("dge-train --config digits", "accelerate launch", "torchrun", "--resume", "summary.json"):
        assert words in out


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _run(capsys, "--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(list_configs())
    status, out, _ = _run(capsys, "--launchers")
    assert [line.split()[0] for line in out.splitlines()] == list(list_launchers())
    status, out, _ = _run(capsys, "--launcher", "cpu")
    assert Path(out.strip()).is_file()
    status, out, _ = _run(capsys, "--keys")
    assert "optim.lr  [required]\n    peak learning rate\n" in out


def test_show_prints_what_would_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # Overrides may stand anywhere.
    status, out, _ = _run(
        capsys,
        "data.shift=1",
        "--config",
        "digits",
        "--show",
        "optim.lr=7e-3",
        "--output",
        str(tmp_path / "x"),
        "eval.batch_size=9",
    )
    assert status == 0
    for line in ("lr: 0.007", "shift: 1.0", "batch_size: 9"):
        assert line in out
    assert f"dir: {tmp_path / 'x'}" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say which recipe: --config"),
        (["--config", "digit"], "did you mean 'digits'"),
        (["--config", "digits", "optim.lrr=1"], "unknown key: 'optim.lrr' (did you mean 'optim.lr'?)"),
        (["--config", "digits", "train.epochs=many"], "'train.epochs'"),
        (["--config", "digits", "oops"], "not of the form section.key=value"),
        (["--config", "deit_tiny_256", "data.root=/nowhere/at/all"], "/nowhere/at/all/train does not exist"),
        (["--config", "digits", "--resume", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--config", "digits_converted", "model.init_from=/nowhere/at/all"], "/nowhere/at/all does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_a_failure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: Sequence[str], words: str
) -> None:
    output = ["--output", str(tmp_path / "run")] if arguments else []
    status, _, err = _run(capsys, *arguments, *output)
    assert status == 1
    assert err.count("\n") == 1
    assert err.startswith("dge-train: error: ")
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output(capsys: pytest.CaptureFixture[str], small: Sequence[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, _, err = _run(capsys, "--config", "digits", *small, "--output", str(tmp_path / "file" / "run"))
    assert status == 1
    assert err.count("\n") == 1
    assert "cannot be written" in err


def test_train_then_refuse_then_overwrite(
    command: Callable[..., Any], capsys: pytest.CaptureFixture[str], small: Sequence[str], tmp_path: Path
) -> None:
    arguments = ["-m", "dge_recipes.train", "--config", "digits", "--output", str(tmp_path / "run"), *small]
    first = command(*arguments)
    assert first.returncode == 0, first.stderr
    assert "| deit_dge_s124_tiny_patch16_256 |" in first.stdout
    assert "epoch 2 eval: Acc@1" in first.stderr
    assert "Warning" not in first.stderr
    status, out, err = _run(capsys, *arguments[2:])
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "is not empty" in err
    assert _run(capsys, *arguments[2:], "--overwrite")[0] == 0
