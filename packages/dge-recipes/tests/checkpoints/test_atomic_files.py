"""Folders that are whole or not there."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dge_recipes.checkpoints.atomic_files import MANIFEST, damage, write_file, write_folder, write_text
from dge_recipes.errors import UserError


def _fill(text: str = "data") -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "a.bin").write_text(text * 1000, encoding="utf-8")
        (folder / "b.json").write_text("{}", encoding="utf-8")

    return fill


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "step"
    write_folder(path, _fill())
    return path


def test_a_written_folder_is_whole_and_nothing_else_is_left(folder: Path) -> None:
    assert damage(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == ["a.bin", "b.json", MANIFEST]
    assert [path.name for path in folder.parent.iterdir()] == ["step"]


def test_rewriting_replaces(folder: Path) -> None:
    write_folder(folder, _fill("new"))
    assert damage(folder) is None
    assert (folder / "a.bin").read_text(encoding="utf-8").startswith("new")


def test_others_may_read_what_they_usually_may(tmp_path: Path) -> None:
    def private(path: Path) -> None:
        path.write_text("weights", encoding="utf-8")
        path.chmod(0o600)

    usual = tmp_path / "usual"
    usual.touch()
    write_file(tmp_path / "file", private)
    write_folder(tmp_path / "folder", lambda folder: private(folder / "a.bin"))
    for path in (tmp_path / "file", tmp_path / "folder" / "a.bin", tmp_path / "folder" / MANIFEST):
        assert path.stat().st_mode == usual.stat().st_mode


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old", encoding="utf-8")

    def fail(path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(UserError, match=r"cannot write .*file: the disk is full"):
        write_file(target, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text(encoding="utf-8") == "old"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("hurt", "words"),
    [
        (lambda folder: _flip(folder / "a.bin"), "a.bin does not match its checksum"),
        (lambda folder: (folder / "a.bin").write_bytes(b"x"), "a.bin has 1 bytes, expected 4000"),
        (lambda folder: (folder / "b.json").unlink(), "b.json is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text(json.dumps({"format": 9, "files": {}})), "format is 9"),
    ],
)
def test_damage_is_found_and_named(folder: Path, hurt: Callable[[Path], object], words: str) -> None:
    hurt(folder)
    assert words in str(damage(folder))


@pytest.mark.parametrize(("number", "damaged"), [(errno.EIO, True), (errno.EMFILE, False), (errno.ESTALE, False)])
def test_what_the_machine_does_is_no_damage_unless_the_bytes_are_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, damaged: bool
) -> None:
    def fail(path: Path, **_: object) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "read_text", fail)
    if damaged:
        assert "cannot be read" in str(damage(folder))
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            damage(folder)


def test_a_crash_while_writing_leaves_what_was_there(folder: Path) -> None:
    def crash(aside: Path) -> None:
        (aside / "a.bin").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, crash)
    assert damage(folder) is None
    # What the crash left under another name does not disturb the next attempt.
    write_folder(folder, _fill("next"))
    assert damage(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == ["step"]


def test_a_full_disk_is_told_and_leaves_what_was_there(folder: Path) -> None:
    def fail(aside: Path) -> None:
        (aside / "a.bin").write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="the disk is full; what was saved before is intact"):
        write_folder(folder, fail)
    assert damage(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == ["step"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_folder(tmp_path / "file" / "step", _fill())
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "file" / "summary.json", "")
