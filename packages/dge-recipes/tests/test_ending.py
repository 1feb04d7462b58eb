"""A command that has failed ends in seconds, and its threads print no tracebacks of what the machine did."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from dge_recipes.ending import debugging, told_threads

_HANGS = """
import atexit, sys, threading, time
from types import SimpleNamespace
from dge_recipes import cli, ending
from dge_recipes.errors import MachineError

ending._SECONDS = 0.5
where = sys.argv[1]

def fail():
    class Leftover:
        def __del__(self):
            time.sleep(60 if where == "leftover" else 0)

    leftover = Leftover()
    raise MachineError("out of memory; use less")

killed = lambda: print("killed", flush=True)
sys.modules["dge_recipes.data.workers"] = SimpleNamespace(
    lost_worker=lambda **_: None, any_worker=lambda: True, kill_workers=killed
)
group = SimpleNamespace(end_processes=lambda: time.sleep(60 if where == "group" else 0))
sys.modules["dge_recipes.processes"] = group
atexit.register(time.sleep, 60 if where == "exit" else 0)
sys.exit(cli.run_command("test", fail))
"""


@pytest.mark.parametrize("where", ["leftover", "group", "exit"])
def test_an_end_that_would_hang(command: Callable[..., Any], where: str) -> None:
    start = time.monotonic()
    result = command("-c", _HANGS, where, timeout=50)
    assert time.monotonic() - start < 30
    assert result.returncode == 75
    assert result.stderr == "test: error: out of memory; use less; then start the same command again\n"
    assert result.stdout == "killed\n"


def test_an_end_that_does_not_hang(command: Callable[..., Any]) -> None:
    result = command("-c", _HANGS.replace("any_worker=lambda: True", "any_worker=lambda: False"), "", timeout=50)
    assert (result.returncode, result.stdout) == (75, "")


def _in_a_thread(error: Exception) -> None:
    def fail() -> None:
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOENT])
def test_a_threads_error_is_told_where_it_is_met(caplog: pytest.LogCaptureFixture, number: int) -> None:
    full = OSError(number, os.strerror(number))
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="x"), told_threads():
        _in_a_thread(full)
        raise ValueError("x") from full
    assert caplog.text == ""


def test_a_threads_error_that_is_met_nowhere_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), told_threads():
        _in_a_thread(OSError(errno.ENOSPC, "No space left on device"))
    assert caplog.messages == ["a thread ended: [Errno 28] No space left on device"]


@pytest.mark.parametrize(
    ("error", "debug"),
    [
        (ValueError("a fault"), "0"),
        (OSError(errno.ENOENT, "No such file or directory"), "0"),
        (OSError(errno.ENOSPC, "No space left on device"), "1"),
    ],
)
def test_a_threads_own_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception, debug: str) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    monkeypatch.setenv("DGE_DEBUG", debug)
    with told_threads():
        _in_a_thread(error)
    assert len(seen) == 1
    assert threading.excepthook == seen.append


@pytest.mark.parametrize(("value", "wanted"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)])
def test_debugging(monkeypatch: pytest.MonkeyPatch, value: str | None, wanted: bool) -> None:
    monkeypatch.delenv("DGE_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("DGE_DEBUG", value)
    assert debugging() is wanted
