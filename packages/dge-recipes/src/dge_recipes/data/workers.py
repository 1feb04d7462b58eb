"""Data loading processes: they outlive a request to stop, but not the process that they work for, and none is lost
without a word."""

import atexit
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import cache
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any, TypeVar

from dge_recipes.errors import MachineError
from dge_recipes.machine_errors import machine_error

__all__ = ["WorkerSignals", "lost_worker", "watched", "worker_context", "worker_signals"]
__all__ += ["any_worker", "forget_workers", "kill_workers"]

_PATIENCE = 0.5  # seconds from the loss of a process's connections to that of the process
_WORDS = 1000  # bytes
_FEWER = "fewer data.workers or smaller batches may help"
_CRASHES = {signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP}
_STARTED: list[BaseProcess] = []
_NEEDED: list[BaseProcess] = []  # those of them that the run needs
_BEFORE: list[Callable[[int, FrameType | None], Any]] = []  # the handler of SIGCHLD that this module's stands before

T = TypeVar("T")
_waiting = False  # for a batch


class _Flag:
    """An event in shared memory, without a lock.

    A process that is killed while it looks at one of multiprocessing's keeps its lock. The loader sets its event when
    it ends its workers, and would wait for that lock for ever.
    """

    def __init__(self) -> None:
        self._value: Any = multiprocessing.Value("b", 0, lock=False)

    def is_set(self) -> bool:
        return bool(self._value.value)

    def set(self) -> None:
        self._value.value = 1


class WorkerSignals:
    """Called in every worker at its start: has it ignore requests to stop until its parent exits.

    A cluster's SIGTERM reaches every process of a job, as a terminal's Ctrl-C and its closing do; a run that lost its
    workers to one of them could not save in peace.
    But at its exit a process ends its workers by SIGTERM too, and waits for them.

    A worker that cannot hand over a batch ends. By itself it would go on, and the run would wait for that batch for
    ever: this happens in a thread of multiprocessing's, which then prints a traceback and does no more.

    Args:
        ending: set when the parent exits.
        words: a text in shared memory: why a worker ended itself.
    """

    def __init__(self, ending: _Flag, words: Any) -> None:
        self._ending, self.words = ending, words

    def __call__(self, worker: int) -> None:
        """Install the handlers."""
        signal.signal(signal.SIGTERM, self._handle)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # The hooks of the threads that put batches into the queue, and that hand out the memory that they lie in.
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(self._give_up)  # type: ignore[attr-defined]
        sys.excepthook = self._fail

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ending.is_set():
            os._exit(0)

    def _fail(self, kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if isinstance(error, Exception) and machine_error(error) is not None:
            self._give_up(error)
        sys.__excepthook__(kind, error, where)

    def _give_up(self, error: Exception, batch: object = None) -> None:
        fault = machine_error(error)
        if fault is None:
            traceback.print_exception(error)
        self.words.value = str(fault or "").encode()[: _WORDS - 1]
        os._exit(1)


@cache
def worker_signals() -> WorkerSignals:
    """The one of this process, for ``DataLoader(worker_init_fn=...)``."""
    ending = _Flag()
    # Runs before multiprocessing's own exit function, which was registered earlier and joins the workers.
    atexit.register(ending.set)
    return WorkerSignals(ending, multiprocessing.Array("c", _WORDS, lock=False))


def worker_context() -> BaseContext:
    """How processes are started here, for ``DataLoader(multiprocessing_context=...)``.

    What it starts is remembered, and a worker that is lost can hold nothing that the loader waits for.
    """
    # At the first batch PyTorch imports its profiler, and logs and forgets what interrupts it, a lost worker too.
    import torch.autograd.profiler

    with torch.autograd.profiler.record_function("data"):
        pass
    context = copy(multiprocessing.get_context())
    create = context.Process

    def remembered(*arguments: Any, **options: Any) -> BaseProcess:
        process: BaseProcess = create(*arguments, **options)
        _STARTED[:] = [each for each in _STARTED if each.pid is None or each.exitcode is None]
        for known in (_STARTED, _NEEDED):
            known.append(process)
        return process

    context.Process = remembered  # type: ignore[assignment, misc]
    context.Event = _Flag  # type: ignore[assignment, method-assign]
    return context


def forget_workers() -> None:
    """What becomes of the workers of earlier runs of this process is no longer of interest."""
    _NEEDED.clear()


def watched(batches: Iterable[T]) -> Iterator[T]:
    """Batches of a loader; a worker that is lost meanwhile ends them.

    By itself PyTorch raises the error of that from wherever the process is, be it in a library that forgets it, or in
    the midst of saving. Here it comes with the next batch, at once if that is being waited for.

    Args:
        batches: a loader, as prepared.

    Raises:
        MachineError: a worker was killed.
        RuntimeError: it crashed.
    """
    global _waiting
    iterator, first = iter(batches), True
    while True:
        _raise_lost()
        _waiting = True
        try:
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            _waiting = False
        if first:  # now PyTorch has started its workers, and installed its handler
            _take_over()
            first = False
        yield batch


def _take_over() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is threading.main_thread() and callable(before) and before is not _note_end:
        _BEFORE[:] = [before]
        signal.signal(signal.SIGCHLD, _note_end)


def _note_end(number: int, frame: FrameType | None) -> None:
    if any(process.exitcode for process in (*_NEEDED, *_STARTED)):
        if _waiting:
            _raise_lost()
    elif _BEFORE:  # it raises, of processes of other loaders too
        before = _BEFORE.pop()  # it may call this one in turn, which was there before it
        try:
            before(number, frame)
        finally:
            _BEFORE.append(before)


def _raise_lost() -> None:
    error = lost_worker()
    if error is not None:
        raise error


def lost_worker(*, wait: bool = False) -> Exception | None:
    """What became of a worker that ended before its time. Each is told of once.

    Args:
        wait: for a moment, since one may be ending: the connections of a process go before it does.

    Returns:
        :class:`MachineError`, an error for what is no fault of the machine's, or None: none was lost.
    """
    alive = [process for process in _NEEDED if process.pid is not None and process.exitcode is None]
    if wait and len(alive) == len(_NEEDED) and alive:
        ended = multiprocessing.connection.wait([process.sentinel for process in alive], _PATIENCE)
        for process in alive:
            if process.sentinel in ended:
                process.join(_PATIENCE)
    lost = [process for process in _NEEDED if process.exitcode]
    if not lost:
        return None
    _NEEDED[:] = [process for process in _NEEDED if process not in lost]
    killed = [process for process in lost if (process.exitcode or 0) < 0]
    return _killed(*killed) if killed else _ended(lost[0])


def any_worker() -> bool:
    """Whether a worker of this process is left."""
    return any(process.pid is not None and process.exitcode is None for process in _STARTED)


def kill_workers() -> None:
    """End the workers of this process without asking them: one may wait for ever for what a killed one held."""
    for process in _STARTED:
        if process.pid is not None:
            process.kill()


def _killed(process: BaseProcess, *others: BaseProcess) -> Exception:
    number = -(process.exitcode or 0)
    which = f"data loading process {process.pid}" + (f" (and {len(others)} more)" if others else "")
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number in _CRASHES:
        return RuntimeError(f"{which} crashed ({name}); with data.workers=0 it may be seen where")
    if number == signal.SIGBUS:
        reason = f"a bus error ({name}) ended {which}: /dev/shm is full, or a file in use is gone"
        return MachineError(f"{reason}; a larger one (docker run --shm-size), {_FEWER}")
    return MachineError(f"{which} was killed ({name}), as the system does when memory runs out; {_FEWER}")


def _ended(process: BaseProcess) -> Exception:
    which, words = f"data loading process {process.pid}", worker_signals().words.value.decode(errors="replace")
    if words:
        worker_signals().words.value = b""  # told of once
        return MachineError(f"{which}: {words}")
    return RuntimeError(f"{which} ended with status {process.exitcode}; with data.workers=0 it may be seen why")
