"""Open files: few, the right ones after a fork and between threads, and never an old one for a new file."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dge_recipes.data import tar_files
from dge_recipes.data.tar_files import MOST_OPEN, close_files, read_at

_FILES = 40


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[list[str]]:
    """Files of six bytes that hold their number twice."""
    files = [tmp_path / f"{number}.bin" for number in range(_FILES)]
    for number, file in enumerate(files):
        file.write_bytes(b"%03d" % number * 2)
    close_files()
    yield [str(file) for file in files]
    close_files()


def _open(paths: list[str]) -> set[str]:
    """Which of the files this process holds open."""
    held = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return {os.readlink(link) for link in held if link.is_symlink()} & set(paths)


def _right(paths: list[str]) -> bool:
    return [read_at(path, 3, 3) for path in paths] == [b"%03d" % number for number in range(_FILES)]


def test_no_more_than_a_few_stay_open_and_those_are_the_latest(paths: list[str]) -> None:
    most = 0
    for path in paths:
        read_at(path, 3, 0)
        most = max(most, len(_open(paths)))
    assert most == MOST_OPEN
    read_at(paths[-MOST_OPEN], 3, 0)
    read_at(paths[0], 3, 0)
    assert _open(paths) == {*paths[-MOST_OPEN:], paths[0]} - {paths[1 - MOST_OPEN]}
    close_files()
    assert _open(paths) == set()


def test_processes_go_on_with_what_they_inherit_and_close_what_they_replace(paths: list[str]) -> None:
    assert _right(paths)
    before, read_end, write_end = _open(paths), *os.pipe()
    child = os.fork()
    if child == 0:
        try:
            inherited = _open(paths) == before and read_at(sorted(before)[0], 3, 0) != b""
            right = _right(paths) and len(_open(paths)) == MOST_OPEN
            os.write(write_end, b"1" if inherited and right else b"0")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read_end, 1) == b"1"
    os.close(read_end)
    os.close(write_end)
    assert _open(paths) == before
    assert _right(paths)


def test_a_file_is_not_closed_while_a_thread_reads_it(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its number would soon be another file's."""
    started, go_on = threading.Event(), threading.Event()
    read, answers = os.pread, []

    def slowly(number: int, size: int, offset: int) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            started.set()
            go_on.wait(20)
        return read(number, size, offset)

    monkeypatch.setattr(os, "pread", slowly)
    reader = threading.Thread(target=lambda: answers.append(read_at(paths[7], 6, 0)))
    reader.start()
    assert started.wait(20)
    assert _right(paths)  # many others in between
    go_on.set()
    reader.join()
    assert answers == [b"007007"]
    assert len(_open(paths)) == MOST_OPEN


def test_a_file_that_was_replaced_is_read_anew(paths: list[str]) -> None:
    assert read_at(paths[0], 3, 0) == b"000"
    Path(f"{paths[0]}.new").write_bytes(b"999999")
    os.replace(f"{paths[0]}.new", paths[0])
    close_files()
    assert read_at(paths[0], 3, 0) == b"999"


def test_answers_in_pieces(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda number, size, offset: read(number, min(size, 2), offset))
    assert read_at(paths[12], 5, 1) == b"12012"
    assert read_at(paths[12], 50, 1) == b"12012"
    assert read_at(paths[12], 5, 6) == b""


def test_errors_name_the_file(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(FileNotFoundError, match=r"nowhere\.bin"):
        read_at(str(Path(paths[0]).with_name("nowhere.bin")), 3, 0)
    monkeypatch.setattr(tar_files.os, "pread", fails)
    with pytest.raises(OSError, match=r"Input/output error: .*0\.bin") as raised:
        read_at(paths[0], 3, 0)
    assert raised.value.errno == errno.EIO
