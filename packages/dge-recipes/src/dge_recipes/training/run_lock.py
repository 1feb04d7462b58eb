"""One run at a time in a folder: a second start of the same job would mix both runs' checkpoints."""

import fcntl
import logging
import os
from pathlib import Path
from typing import IO

from dge_recipes.errors import UserError

__all__ = ["LOCK_FILE", "lock_folder", "unlock_folder"]

LOCK_FILE = ".lock"

_LOG = logging.getLogger(__name__)
_HELD: dict[Path, IO[bytes]] = {}


def lock_folder(folder: Path) -> None:
    """Keep other processes from locking a folder until :func:`unlock_folder`, or until this process ends somehow.

    A POSIX record lock: data loading processes do not inherit it, so a killed run leaves nothing behind, and
    machines that share a folder over NFS see each other's.

    Args:
        folder: that exists.

    Raises:
        UserError: another process has locked it.
        OSError: nothing can be written there.
    """
    unlock_folder(folder)
    path = folder / LOCK_FILE
    file = path.open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(path, file):  # its holder has just let go of it
            raise BlockingIOError
    except (BlockingIOError, PermissionError) as error:  # POSIX allows either
        file.close()
        raise UserError(
            f"output folder {folder}: another run is writing there; wait for its end, stop it, or choose another "
            "(output.dir=...)"
        ) from error
    except OSError as error:
        _LOG.warning("%s cannot be locked (%s): see to it that no other run writes there", folder, error.strerror)
    _HELD[folder.resolve()] = file


def unlock_folder(folder: Path) -> None:
    """Let others lock a folder; nothing happens to one that this process has not locked."""
    file = _HELD.pop(folder.resolve(), None)
    if file is not None:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        file.close()


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether an open file is still the one at its path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
