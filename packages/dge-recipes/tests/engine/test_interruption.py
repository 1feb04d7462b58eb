"""Requests to stop are remembered; a run lets go of what it holds, and what fails then does not hide why it ended."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dge_recipes.engine.consensus import Halt
from dge_recipes.engine.interruption import StopSignal, leaving
from dge_recipes.engine.run_folder import LOCK_FILE, lock_folder

pytestmark = pytest.mark.usefixtures("heeded_signals")

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@pytest.mark.parametrize("number", _SIGNALS)
def test_a_signal_is_remembered_and_the_handlers_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in _SIGNALS]
    with StopSignal() as stop:
        stop.worth_saving = True
        assert stop.request is Halt.NONE
        os.kill(os.getpid(), number)
        assert stop.request is Halt[number.name]
    assert [signal.getsignal(each) for each in _SIGNALS] == before


def test_ctrl_c_ends_at_once_if_nothing_would_be_lost() -> None:
    with StopSignal(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with StopSignal() as stop:
        stop.worth_saving = True
        for now[0] in (100.0, 100.5):  # the same one, handed on by a launcher
            os.kill(os.getpid(), signal.SIGINT)
        now[0] = 103.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.split("\n") == [
        "",
        "stopping after this step, to save it; Ctrl-C again ends at once",
        "",
    ]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_nohup_ignores_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert stop.request is Halt.NONE
    finally:
        signal.signal(number, before)


def test_outside_of_the_main_thread_nothing_changes() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def inside() -> None:
        with StopSignal():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def _accelerator(done: list[str], failing: bool) -> Any:
    def finish() -> None:
        done.append("tracker")
        if failing:
            raise OSError(28, "No space left on device")

    return SimpleNamespace(trackers=[SimpleNamespace(finish=finish)], free_memory=lambda: done.append("memory"))


def _lock(folder: Path) -> Callable[[], bool]:
    lock_folder(folder)
    return (folder / LOCK_FILE).exists


def test_all_is_let_go_of(tmp_path: Path) -> None:
    done: list[str] = []
    locked = _lock(tmp_path)
    with leaving(_accelerator(done, failing=False), tmp_path):
        assert locked()
    assert (done, locked()) == (["tracker", "memory"], False)


def test_the_first_error_is_the_one_to_tell(tmp_path: Path) -> None:
    done: list[str] = []
    locked = _lock(tmp_path)
    with pytest.raises(ValueError, match="first"), leaving(_accelerator(done, failing=True), tmp_path):
        raise ValueError("first")
    assert (done, locked()) == (["tracker", "memory"], False)


def test_a_tracker_that_cannot_be_closed_is_told_after_a_whole_run(tmp_path: Path) -> None:
    locked = _lock(tmp_path)
    with pytest.raises(OSError, match="No space"), leaving(_accelerator([], failing=True), tmp_path):
        pass
    assert not locked()
