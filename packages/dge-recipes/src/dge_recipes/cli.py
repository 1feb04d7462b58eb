"""What the command lines share: one-line errors, and an orderly end of the processes."""

import argparse
import ctypes
import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from dge_recipes.ending import debugging, debugging_if, end_soon, told_threads
from dge_recipes.errors import MachineError, RunStopped, StdoutError, UserError
from dge_recipes.machine_errors import machine_errors

__all__ = ["check_target", "comma_list", "command_parser", "run_command"]

Number = TypeVar("Number", int, float)

_SIGPIPE = 128 + 13  # what a shell reports of a program that SIGPIPE ended
_SIGINT = 128 + 2
_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h, which batch systems know
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as in malloc.h


def command_parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help shows the texts as they are written, with the options that all commands have."""
    parser = argparse.ArgumentParser(
        name,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from, as DGE_DEBUG=1 does")
    return parser


def run_command(
    name: str, command: Callable[[], None], again: str = "start the same command again", *, whole: bool = False
) -> int:
    """Run a command line's body.

    Args:
        name: what the user typed, for the error line.
        command: the body.
        again: how to go on after what the machine did, for the error line.
        whole: show the whole traceback of an error, as with DGE_DEBUG=1.

    Returns:
        Exit status: 0, also after :class:`RunStopped`; 1 after a :class:`UserError`; 75, "try again", after a
        :class:`MachineError`. All are told in one line on stderr, with DGE_DEBUG=1 or `whole` after the traceback.
        130 after Ctrl-C; 141, without a word, where nobody reads stdout any more, as in ``| head``.
        Any other exception is a fault of the program and keeps its traceback. That nobody reads stderr any more ends
        nothing.
    """
    stderr = sys.stderr  # a run goes on without its terminal, or the tee behind it
    with redirect_stderr(cast(TextIO, _Stream(stderr, lambda error: _discard(stderr)))), debugging_if(whole):
        return _run(name, command, again)


def _run(name: str, command: Callable[[], None], again: str) -> int:
    # Read when PyTorch loads OpenMP, which is after this. Threads that spin while they wait take the cores from
    # whatever else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()
    logging.basicConfig(format=f"{name}: %(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    output = cast(TextIO, _Stream(sys.stdout, _end_command))
    with ExitStack() as ending:
        try:
            with redirect_stdout(output), told_threads(), machine_errors():
                command()
                output.flush()
            status = 0
        except RunStopped as stopped:
            if os.environ.get("RANK", "0") == "0":
                _tell(f"{name}: {stopped}")
            status = _SIGINT if stopped.interrupted else 0
        except UserError as error:
            status, more = (_TRY_AGAIN, f"; then {again}") if isinstance(error, MachineError) else (1, "")
            ending.enter_context(end_soon(status))
            _tell_error(name, error, f"{error}{more}")
        except KeyboardInterrupt:
            _tell(f"{name}: interrupted")
            status = _SIGINT
        except StdoutError as error:
            _discard(sys.stdout)
            status = _SIGPIPE
            if error.errno != errno.EPIPE:
                _tell_error(name, error, f"cannot write to stdout: {error.reason}")
                status = 1
        processes = sys.modules.get("dge_recipes.processes")
        if processes is not None:  # else there are none to end, and importing it would take seconds
            processes.end_processes()
    return status


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tell_error(name: str, error: Exception, text: str) -> None:
    if debugging():
        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    _tell(f"{name}: error: {' '.join(text.split())}{where}")


def check_target(option: str, path: Path, *, suffixes: Sequence[str] = (), folder: bool = False) -> None:
    """Tell at once, not after hours of work, that a result cannot be written. Writes nothing.

    Args:
        option: what the user calls it, such as ``--json``.
        path: a file to write, or a folder to write into; folders above it are made later.
        suffixes: what a file's name must end in; empty: anything.
        folder: it is a folder.

    Raises:
        UserError: it cannot be written.
    """
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"{option} {path} must end in {' or '.join(suffixes)}")
    if not folder and path.is_dir():
        raise UserError(f"{option} {path} is a folder; expected a file's name")
    whole = path.absolute()
    above = next(each for each in ([whole] if folder else []) + list(whole.parents) if each.exists())
    if not above.is_dir():
        raise UserError(f"{option}: cannot write {path}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{option}: cannot write {path}: no permission to write into {above}")


def comma_list(option: str, text: str, number: type[Number], example: str) -> list[Number]:
    """The numbers that a user has put commas between.

    Args:
        option: what the user calls it, such as ``--batches``.
        text: as given.
        number: ``int`` or ``float``.
        example: for the error.

    Raises:
        UserError: something else.
    """
    try:
        return [number(part) for part in text.split(",")]
    except ValueError as error:
        kind = "whole numbers" if number is int else "numbers"
        raise UserError(f"{option} {text!r}: expected {kind} with commas between, for example {example}") from error


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: a step on a CPU frees all that the next one needs, and fetching it anew from the
    system costs a twentieth of the step and more. Elsewhere, or where the user has set a threshold, nothing happens.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that it takes


class _Stream:
    """A stream whose errors are not those of any file.

    Args:
        stream: what it stands for.
        failed: told what went wrong; what it does not raise is forgotten.
    """

    def __init__(self, stream: TextIO, failed: Callable[[OSError], None]) -> None:
        self._stream, self._failed = stream, failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any stream."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        """As of any stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)


def _end_command(error: OSError) -> None:
    raise StdoutError(error) from error


def _discard(stream: TextIO) -> None:
    """Send to nowhere what is written from here on, and what Python would write at exit, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
