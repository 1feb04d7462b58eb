"""Remembering requests to stop, and which of several reasons to halt counts."""

import os
import signal
import threading

import pytest
from accelerate import Accelerator

from dge_recipes.training.stopping import Agreement, Halt, StopSignal

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


def test_one_process_agrees_with_itself_at_once() -> None:
    agreement = Agreement(Accelerator(cpu=True))
    for halt in Halt:
        assert agreement.share(halt) is halt
        assert agreement.settle(halt) is halt
    assert max(Halt) is Halt.BAD_NUMBER
