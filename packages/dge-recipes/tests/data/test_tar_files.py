"""What tar files hold besides plain files: links, holes, damage, and other archives behind their end."""

import os
import tarfile
from pathlib import Path

import pytest
from sample_images import add

from dge_recipes.data.tar_files import list_members, read_member
from dge_recipes.errors import UserError


def _link(tar: tarfile.TarFile, name: str, target: str, kind: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    tar.addfile(info)


def _contents(path: Path) -> dict[str, bytes]:
    return {member.path: read_member(member) for member in list_members([path])}


def test_links_count_as_what_they_lead_to(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "./x/1.png", b"one")
        _link(tar, "x/2.png", "./x/1.png", tarfile.LNKTYPE)
        _link(tar, "y/3.png", "../x/2.png", tarfile.SYMTYPE)
        _link(tar, "y/4.png", "5.png", tarfile.SYMTYPE)
        add(tar, "y/5.png", b"five")
        add(tar, ".store/6", b"six")
        _link(tar, "y/6.png", "../.store/6", tarfile.SYMTYPE)
    expected = {"x/1.png": b"one", "x/2.png": b"one", "y/3.png": b"one", "y/4.png": b"five", "y/5.png": b"five"}
    assert _contents(path) == {**expected, "y/6.png": b"six"}
    outer = tmp_path / "outer.tar"
    with tarfile.open(outer, "w") as tar:
        tar.add(path, "deep/a.tar")
    assert _contents(outer) == {f"a/{name}": content for name, content in {**expected, "y/6.png": b"six"}.items()}


@pytest.mark.parametrize("target", ["/data/1.png", "2.png", "folder", "loop.png"])
def test_images_that_are_links_to_nowhere(tmp_path: Path, target: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        _link(tar, "loop.png", target, tarfile.SYMTYPE)
        info = tarfile.TarInfo("folder")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    with pytest.raises(UserError, match=rf"a\.tar .*: loop\.png is a link to {target}, which is no file in it"):
        list_members([tmp_path / "a.tar"])


def test_other_links_to_nowhere_are_files_without_content(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", b"one")
        _link(tar, "data", "/data", tarfile.SYMTYPE)
    assert _contents(tmp_path / "a.tar") == {"1.png": b"one", "data": b""}


def _two(tmp_path: Path) -> tuple[bytes, bytes]:
    paths = (tmp_path / "1.tar", tmp_path / "2.tar")
    for path in paths:
        with tarfile.open(path, "w") as tar:
            for number in range(3):
                add(tar, f"{number}.png", bytes([number]) * 700)
    return paths[0].read_bytes(), paths[1].read_bytes()


def test_two_tars_in_one_file(tmp_path: Path) -> None:
    """Tar, and Python's tarfile, stop at the end of the first."""
    (tmp_path / "both.tar").write_bytes(b"".join(_two(tmp_path)))
    with pytest.raises(UserError, match=r"both\.tar .*: another tar follows its end; expected one"):
        list_members([tmp_path / "both.tar"])


def test_a_damaged_header_ends_nothing_in_silence(tmp_path: Path) -> None:
    whole, _ = _two(tmp_path)
    second = 3 * tarfile.BLOCKSIZE  # behind a header and 700 bytes
    (tmp_path / "1.tar").write_bytes(whole[:second] + b"damage" + whole[second + 6 :])
    with pytest.raises(UserError, match=r"1\.tar .*: it is damaged at byte 1536"):
        list_members([tmp_path / "1.tar"])
    (tmp_path / "1.tar").write_bytes(whole[: second + 100])
    with pytest.raises(UserError, match=r"1\.tar .*: it is damaged at byte 1536"):
        list_members([tmp_path / "1.tar"])
    (tmp_path / "1.tar").write_bytes(whole[: second + 600])
    with pytest.raises(UserError, match=r"1\.tar cannot be read as an uncompressed tar file: unexpected end of data"):
        list_members([tmp_path / "1.tar"])


def test_anything_else_may_follow_the_end(tmp_path: Path) -> None:
    whole, _ = _two(tmp_path)
    for more in (b"", b"\0" * 5000, b"padding" * 300):
        (tmp_path / "1.tar").write_bytes(whole + more)
        assert len(list_members([tmp_path / "1.tar"])) == 3
    (tmp_path / "1.tar").write_bytes(whole.rstrip(b"\0").ljust(9 * tarfile.BLOCKSIZE, b"\0"))  # without an end
    assert len(list_members([tmp_path / "1.tar"])) == 3


def test_files_with_holes(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("1.bmp")
        info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info)
    with pytest.raises(UserError, match=r"1\.bmp is stored with holes; expected a tar made without --sparse"):
        list_members([tmp_path / "a.tar"])


def test_listing_leaves_no_file_open_and_reads_a_replaced_tar_anew(tmp_path: Path) -> None:
    first, _ = _two(tmp_path)
    with tarfile.open(tmp_path / "outer.tar", "w") as tar:
        tar.add(tmp_path / "2.tar", "2.tar")
    before = len(os.listdir("/proc/self/fd"))
    paths = [tmp_path / "1.tar", tmp_path / "outer.tar"]
    assert len(list_members(paths * 5)) == 30
    assert len(os.listdir("/proc/self/fd")) == before
    assert read_member(list_members(paths)[2]) == b"\2" * 700
    (tmp_path / "new.tar").write_bytes(first.replace(b"\2" * 700, b"\7" * 700))
    os.replace(tmp_path / "new.tar", tmp_path / "1.tar")
    assert read_member(list_members(paths)[2]) == b"\7" * 700


def test_errors_of_the_system_keep_their_words(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(UserError, match=r"a\.tar cannot be read: .*Is a directory"):
        list_members([tmp_path / "a.tar"])
