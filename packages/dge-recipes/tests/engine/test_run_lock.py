"""Two runs cannot write into one folder at once."""

import errno
import fcntl
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dge_recipes.engine.run_folder import LOCK_FILE, check_still_there, lock_folder, unlock_folder
from dge_recipes.errors import MachineError, UserError

_HOLDER = """
import sys
from pathlib import Path
from dge_recipes.engine.run_folder import lock_folder
lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path, environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has locked the folder, until it is killed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_run_is_refused_until_the_first_is_gone(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(UserError, match=r"another run is writing there; wait for its end, stop it, or choose another"):
        lock_folder(tmp_path)
    holder.kill()  # which leaves the lock's file, and nobody who holds it
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    lock_folder(tmp_path)
    unlock_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_process_may_lock_again(tmp_path: Path) -> None:
    lock_folder(tmp_path)
    lock_folder(tmp_path)
    unlock_folder(tmp_path)
    unlock_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING):
        lock_folder(tmp_path)
    assert "cannot be locked (No locks available): see to it that no other run writes there" in caplog.text
    unlock_folder(tmp_path)


def test_a_folder_that_is_no_longer_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    check_still_there(folder)  # of one that was never locked nothing is known
    lock_folder(folder)
    try:
        check_still_there(folder)
        (folder / LOCK_FILE).unlink()  # somebody tidied up
        check_still_there(folder)
        folder.rmdir()
        with pytest.raises(MachineError, match=r"output folder .*run is not where it was: was it moved"):
            check_still_there(folder)
    finally:
        unlock_folder(folder)


def test_a_lock_is_let_go_of_where_nothing_can_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    lock_folder(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Read-only"):
        patch.setattr(Path, "unlink", fail)
        unlock_folder(tmp_path)
    with (tmp_path / LOCK_FILE).open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock_folder(tmp_path)
    unlock_folder(tmp_path)
