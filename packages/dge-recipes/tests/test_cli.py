"""What every command does when its output, its terminal or its user gives up, and when a result has no place."""

import ctypes
import errno
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dge_recipes.cli import check_target, run_command
from dge_recipes.errors import MachineError, UserError

_TRAIN = (sys.executable, "-m", "dge_recipes.train")
_LONG = ("train.epochs=99", "train.batch_size=24", "train.log_every=1", "data.workers=2")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_stdout_any_more(environment: dict[str, str], unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    env = environment | {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run([*_TRAIN, "--list"], env=env, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_stdout_on_a_full_disk(environment: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([*_TRAIN, "--list"], env=environment, stdout=full, stderr=subprocess.PIPE, check=False)
    assert ended.returncode == 1
    assert ended.stderr == b"dge-train: error: cannot write to stdout: No space left on device\n"


def test_a_terminal_that_cannot_show_a_name(environment: dict[str, str]) -> None:
    command = [*_TRAIN, "--config", "digits", "--show", "output.dir=\u00fc"]
    ended = subprocess.run(command, env=environment | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert rb"dir: \xfc" in ended.stdout


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 130, ["", "stopping after this step, to save it; Ctrl-C again ends at once"]),
        (signal.SIGHUP, 0, []),
    ],
)
def test_a_terminal_ends_training(
    start: Callable[..., Any], small: Sequence[str], tmp_path: Path, number: int, status: int, said: list[str]
) -> None:
    run = tmp_path / "run"
    process = start(*_TRAIN[1:], "--config", "digits", "--output", str(run), *small, *_LONG)
    assert "step 1/" in process.stderr.readline()
    os.killpg(process.pid, number)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    *said_first, last = [line for line in err.splitlines() if not re.match("epoch ", line)]
    assert said_first == said
    step = re.fullmatch(
        rf"dge-train: stopped by {signal.Signals(number).name} at step (\d+) of .*; continue with --resume auto", last
    )
    assert step is not None
    assert (run / "checkpoints" / f"step_{int(step[1]):08d}").is_dir()


def _fail(error: Exception, cause: Exception | None = None) -> Callable[[], None]:
    def fail() -> None:
        raise error from cause

    return fail


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such\nfile"), 1, "x: error: no such file\n"),
        (MachineError("a mount is gone"), 75, "x: error: a mount is gone; then do it again\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            75,
            "x: error: No space left on device: /data/x; free some space; then do it again\n",
        ),
    ],
)
@pytest.mark.parametrize("rank", ["0", "3"])
def test_one_line_and_a_status(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    line: str,
    rank: str,
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert run_command("x", _fail(error), "do it again") == status
    where = "" if rank == "0" else " (process 3)"
    assert capsys.readouterr().err == line.replace("\n", f"{where}\n")


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    error = ValueError("a fault")
    with pytest.raises(ValueError, match="a fault") as caught:
        run_command("x", _fail(error))
    assert caught.value is error


@pytest.mark.parametrize("error", [UserError("no such file"), MachineError("a mount is gone")])
def test_debugging_shows_the_traceback_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: UserError
) -> None:
    monkeypatch.setenv("DGE_DEBUG", "1")
    run_command("x", _fail(error, OSError(errno.EIO, "Input/output error")))
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"x: error: {error}")
    assert "OSError: [Errno 5] Input/output error" in before
    assert f"dge_recipes.errors.{type(error).__name__}: {error}" in before


@pytest.mark.parametrize("module", ["train", "evaluate", "benchmark", "visualize", "convert"])
def test_every_command_shows_tracebacks_if_asked_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.delenv("DGE_DEBUG", raising=False)
    main = importlib.import_module(f"dge_recipes.commands.{module}").main
    target = {"train": ["--config", "gone.yaml"], "benchmark": ["--output", "x", "--batches", "no"]}
    target |= {"visualize": ["gone.png", "--checkpoint", "gone", "--output", "x"], "convert": ["gone", "x.pth"]}
    arguments = target.get(module, ["gone"])
    assert main(arguments) == 1
    short = capsys.readouterr().err
    assert main(["--traceback", *arguments]) == 1
    long = capsys.readouterr().err
    assert short.count("\n") == 1
    assert long.startswith("Traceback (most recent call last):\n")
    assert long.endswith(short)
    assert "DGE_DEBUG" not in os.environ
    assert main(arguments) == 1
    assert capsys.readouterr().err == short


def test_nobody_reads_stderr_any_more(start: Callable[..., Any], small: Sequence[str], tmp_path: Path) -> None:
    process = start(*_TRAIN[1:], "--config", "digits", "--output", str(tmp_path / "run"), *small, "train.log_every=1")
    assert "step 1/" in process.stderr.readline()
    process.stderr.close()  # a tee that was ended
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_result_without_a_place_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_target("--json", tmp_path / "new" / "deep" / "x.json")
    check_target("--json", tmp_path / "file")
    check_target("--output", tmp_path, folder=True)
    for path, options, words in (
        (tmp_path, {}, "--x .* is a folder; expected a file's name"),
        (tmp_path / "file" / "x", {}, "--x: cannot write .*file/x: .*file is not a folder"),
        (tmp_path / "file", {"folder": True}, "--x: cannot write .*file is not a folder"),
        (tmp_path / "x.txt", {"suffixes": (".png", ".svg")}, "--x .*x.txt must end in .png or .svg"),
    ):
        with pytest.raises(UserError, match=words):
            check_target("--x", path, **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may everything
    with pytest.raises(UserError, match=r"--x: cannot write .*: no permission to write into"):
        check_target("--x", tmp_path / "y")


_FAULTS = """
import resource
from dge_recipes.cli import run_command

def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(8 << 20) for _ in range(16)]
    for each in held:
        each[:: 4096] = b"x" * (len(each) // 4096)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

run_command("test", lambda: print(fill(), fill(), fill()))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_freed_memory_is_kept_unless_the_user_has_a_say(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    pages = 16 * (8 << 20) // os.sysconf("SC_PAGESIZE")
    first, *later = map(int, command("-c", _FAULTS).stdout.split())
    assert first > pages / 2
    assert max(later) < pages / 10
    monkeypatch.setitem(environment, "MALLOC_MMAP_THRESHOLD_", "65536")
    assert min(map(int, command("-c", _FAULTS).stdout.split())) > pages / 2
