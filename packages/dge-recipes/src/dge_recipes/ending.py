"""How a command ends when something has gone wrong: soon, and without the noise of its threads."""

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from dge_recipes.machine_errors import machine_error

__all__ = ["debugging", "debugging_if", "end_soon", "told_threads"]

_LOG = logging.getLogger(__name__)
_SECONDS = 10.0
_WORKERS = "dge_recipes.data.workers"


def debugging() -> bool:
    """Whether the user wants to see every traceback, by ``DGE_DEBUG=1`` in the environment."""
    return os.environ.get("DGE_DEBUG", "0") not in {"", "0"}


@contextmanager
def debugging_if(asked: bool) -> Iterator[None]:
    """Inside ``with``, the user wants to see every traceback if that was asked for, here and in started processes."""
    before = os.environ.get("DGE_DEBUG")
    if asked:
        os.environ["DGE_DEBUG"] = "1"
    try:
        yield
    finally:
        if asked and before is None:
            del os.environ["DGE_DEBUG"]
        elif asked:
            os.environ["DGE_DEBUG"] = str(before)


@contextmanager
def end_soon(status: int) -> Iterator[None]:
    """Inside ``with``, and again when the process exits, it ends in seconds, whatever its orderly end waits for.

    That may be what a killed data loading process held, or a collective that the other processes never come to.

    Args:
        status: the exit status.
    """
    over, exits = threading.Event(), threading.Event()
    _start(_limit, status, over)
    try:
        yield
    finally:
        over.set()
        if _any_worker():
            _start(_limit_exit, status, exits)
            atexit.register(exits.set)  # runs before what waits for them, which was registered earlier


def _start(limit: Callable[[int, threading.Event], None], status: int, event: threading.Event) -> None:
    with suppress(RuntimeError):  # no more threads may be started: then the end is left to itself
        threading.Thread(target=limit, args=(status, event), daemon=True).start()


def _limit(status: int, over: threading.Event) -> None:
    if not over.wait(_SECONDS):
        _end_now(status)


def _limit_exit(status: int, exits: threading.Event) -> None:
    exits.wait()
    time.sleep(_SECONDS)
    if _any_worker():
        _end_now(status)


def _any_worker() -> bool:
    workers = sys.modules.get(_WORKERS)
    return workers is not None and bool(workers.any_worker())


def _end_now(status: int) -> None:
    workers = sys.modules.get(_WORKERS)
    if workers is not None:
        workers.kill_workers()
    os._exit(status)


@contextmanager
def told_threads() -> Iterator[None]:
    """Inside ``with``, a thread that cannot write or read a file prints no traceback at once.

    Whoever a thread works for, such as a tracker, raises its error when it is next used, and there it is told. Where
    none did, it is told at the end: what the machine did as a warning.
    """
    kept: list[threading.ExceptHookArgs] = []
    before = threading.excepthook

    def keep(arguments: threading.ExceptHookArgs) -> None:
        if isinstance(arguments.exc_value, OSError) and not debugging():
            kept.append(arguments)
        else:
            before(arguments)

    threading.excepthook = keep
    raised: BaseException | None = None
    try:
        yield
    except BaseException as error:
        raised = error
        raise
    finally:
        threading.excepthook = before
        met = []
        while raised is not None:
            met.append(raised)
            raised = raised.__cause__
        for arguments in kept:
            if arguments.exc_value not in met:
                _tell(arguments, before)


def _tell(arguments: threading.ExceptHookArgs, hook: Callable[[threading.ExceptHookArgs], object]) -> None:
    error = arguments.exc_value
    if isinstance(error, Exception) and machine_error(error) is not None:
        _LOG.warning("a thread ended: %s", error)
    else:
        hook(arguments)
