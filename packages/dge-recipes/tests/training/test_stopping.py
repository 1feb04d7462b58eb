"""Remembering SIGTERM, and which of several reasons to halt counts."""

import os
import signal
import threading

from accelerate import Accelerator

from dge_recipes.training.stopping import Agreement, Halt, StopSignal


def test_a_signal_is_remembered_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
    assert signal.getsignal(signal.SIGTERM) is before


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
    assert max(Halt.SIGNAL, Halt.BAD_NUMBER) is Halt.BAD_NUMBER
