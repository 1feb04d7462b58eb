"""Folders and files that are either there, whole, or not there: written aside, then renamed; folders checksummed."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from dge_recipes.errors import UserError
from dge_recipes.machine_errors import machine_error

__all__ = ["MANIFEST", "damage", "write_file", "write_folder", "write_text"]

MANIFEST = "manifest.json"
_FORMAT = 1
_DAMAGED = {errno.EIO, errno.EBADMSG}  # the bytes on the disk are lost; another file's may not be


def write_folder(destination: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder so that no reader and no crash ever sees half of it.

    Args:
        destination: its path; a folder already there is replaced.
        fill: writes the files into the (other) folder it is given.

    Raises:
        UserError: the disk is full or the place cannot be written; what was there before is untouched.
    """
    aside = destination.with_name(f".writing-{destination.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        fill(aside)
        _write_manifest(aside)
        _sync(aside)
        remove_folder(destination)
        aside.rename(destination)
        _sync(destination.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = _reason(error)
        raise UserError(f"cannot write {destination}: {reason}; what was saved before is intact") from error


def _reason(error: OSError | SafetensorError) -> str:
    """Why something could not be written, in a user's words."""
    number = error.errno if isinstance(error, OSError) else _number(str(error))
    if number in {errno.ENOSPC, errno.EDQUOT}:
        return "the disk is full"
    return str(error) if number is None else os.strerror(number)


def _number(text: str) -> int | None:
    """The operating system's error number, which safetensors tells in words alone."""
    found = re.search(r"os error (\d+)", text)
    return None if found is None else int(found[1])


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a crash half-way leaves nothing under its name."""
    if folder.exists():
        doomed = folder.with_name(f".deleting-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that :func:`write_folder` wrote, or None if every byte is as written.

    Raises:
        OSError: the machine does not let it be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, object]] = manifest["files"]
        if manifest["format"] != _FORMAT:
            return f"its format is {manifest['format']!r}, this version reads {_FORMAT}"
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        if error.errno not in _DAMAGED and machine_error(error) is not None:
            raise  # such as too many open files: no reason to fall back to another one
        return f"{MANIFEST} cannot be read ({error})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step.

    Raises:
        UserError: as for :func:`write_file`.
    """
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file, or replace it in one step; folders above it are made.

    Args:
        path: of the file.
        fill: writes the (other) file that it is given.

    Raises:
        UserError: the disk is full or the place cannot be written; what was there before is untouched.
    """
    aside = path.with_name(f".writing-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _usual_mode(aside)
        fill(aside)
        aside.chmod(mode)
        _sync(aside)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {_reason(error)}") from error


def _write_manifest(folder: Path) -> None:
    files, paths = {}, sorted(folder.iterdir())
    mode = _usual_mode(folder / MANIFEST)
    for path in paths:
        path.chmod(mode)
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    text = json.dumps({"format": _FORMAT, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    _sync(folder / MANIFEST)


def _usual_mode(path: Path) -> int:
    """Make an empty file, and tell the mode that it got: safetensors would let nobody but the owner read."""
    path.touch()
    return stat.S_IMODE(path.stat().st_mode)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the operating system put a file, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
