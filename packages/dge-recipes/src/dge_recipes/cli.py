"""What the command lines share: one-line errors, and an orderly end of the processes."""

import logging
import os
import sys
from collections.abc import Callable

from dge_recipes.errors import RunStopped, UserError

__all__ = ["run_command"]


def run_command(name: str, command: Callable[[], None]) -> int:
    """Run a command line's body.

    Args:
        name: what the user typed, for the error line.
        command: the body.

    Returns:
        Exit status: 0, also after :class:`RunStopped`; 1 after a :class:`UserError`. Both are told in one line
        on stderr. Any other exception is a fault of the program and keeps its traceback.
    """
    # Read when PyTorch loads OpenMP, which is after this. Threads that spin while they wait take the cores from
    # whatever else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format=f"{name}: %(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        command()
        status = 0
    except RunStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: {stopped}", file=sys.stderr, flush=True)
        status = 0
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}{_where()}", file=sys.stderr, flush=True)
        status = 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        status = 130
    if "torch" in sys.modules:  # else there are no processes to end, and importing it would take seconds
        from dge_recipes.processes import end_processes

        end_processes()
    return status


def _where() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" (process {rank})"
