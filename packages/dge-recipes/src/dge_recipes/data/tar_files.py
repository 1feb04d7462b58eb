"""Random access to the members of tar files.

timm's tar reader keeps one open file for all processes forked from one, whose position they then share, and
orders files as the file system does. Here an index of offsets is made once, and reading is positional.
"""

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from dge_recipes.data.decoding import decode
from dge_recipes.data.image_files import LeftOut, extension, image_extensions, is_hidden
from dge_recipes.errors import UserError

__all__ = ["MOST_OPEN", "Member", "MemberImages", "close_files", "list_members", "read_at", "read_member"]

# The tars of a small data set all stay open. Of many, images are drawn in random order: to keep more of them open would
# spare few openings, and a process may open 1024 files as a rule, which data loading processes share with images on
# their way to the run.
MOST_OPEN = 8

_MOST_LINKS = 40  # from one to the next, as Linux allows


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar file.

    Attributes:
        tar: path of the outermost tar file.
        path: its path inside; that of a tar in a tar starts with the inner tar's stem.
        offset, size: where its bytes are in `tar`.
        inner: path of the inner tar that it is in; empty if it is in none.
    """

    tar: str
    path: str
    offset: int
    size: int
    inner: str = ""

    def __str__(self) -> str:
        """For messages."""
        return f"{self.tar}: {self.path}"


def list_members(tars: Sequence[Path]) -> list[Member]:
    """Every file in the tars, in the order of the tars' and then of the files' names.

    Links count as the files that they lead to. Hidden files and macOS's twins of files are not listed.

    Raises:
        UserError: one of them is no plain (uncompressed) tar file, is damaged or holds more after its end, or holds
            an image that is a link to nowhere.
    """
    close_files()
    members: list[Member] = []
    for path in sorted(tars):
        try:
            with tarfile.open(path, "r:") as file:
                found = list(_walk(file, str(path), "", 0))
        except tarfile.TarError as error:
            raise UserError(f"{path} cannot be read as an uncompressed tar file: {error}") from error
        except OSError as error:  # of the system, which says nothing of what the file is
            raise UserError(f"{path} cannot be read: {error}") from error
        members += sorted(found, key=lambda member: member.path)
    return members


def read_member(member: Member) -> bytes:
    """A file's bytes. Any number of processes may read at once."""
    content = read_at(member.tar, member.size, member.offset)
    if len(content) != member.size:
        raise OSError(f"{member.tar} ends inside {member.path}")
    return content


def _walk(file: tarfile.TarFile, tar: str, inner: str, start: int) -> Iterator[Member]:
    """Files of a tar whose own first byte is at `start` of the outermost one."""
    prefix = f"{PurePosixPath(inner).stem}/" if inner else ""
    links: list[tarfile.TarInfo] = []
    for info in file:
        name = posixpath.normpath(info.name)
        if is_hidden(name):
            continue
        if info.issym() or info.islnk():
            links.append(info)
        elif info.isfile():
            if info.issparse():
                raise tarfile.ReadError(f"{info.name} is stored with holes; expected a tar made without --sparse")
            found = _walk_inner(file, info, tar, start) if not inner and extension(name) == ".tar" else []
            yield from found or [Member(tar, prefix + name, start + info.offset_data, info.size, inner)]
    yield from _follow(file, links, tar, inner, start)
    _check_end(file)


def _walk_inner(file: tarfile.TarFile, info: tarfile.TarInfo, tar: str, start: int) -> list[Member]:
    try:
        with tarfile.open(fileobj=file.extractfile(info), mode="r:") as inner:
            return list(_walk(inner, tar, posixpath.normpath(info.name), start + info.offset_data))
    except tarfile.TarError as error:
        raise tarfile.ReadError(f"{info.name} inside it: {error}") from error


def _follow(
    file: tarfile.TarFile, links: Sequence[tarfile.TarInfo], tar: str, inner: str, start: int
) -> Iterator[Member]:
    """Links as the files that they lead to; one that leads to none is a file without content, unless it is an image."""
    if not links:
        return
    prefix = f"{PurePosixPath(inner).stem}/" if inner else ""
    known = {posixpath.normpath(info.name): info for info in file.getmembers()}
    for link in links:
        path, target = prefix + posixpath.normpath(link.name), _target(link, known)
        if target is not None:
            yield Member(tar, path, start + target.offset_data, target.size, inner)
        elif extension(path) in image_extensions():
            raise tarfile.ReadError(f"{link.name} is a link to {link.linkname}, which is no file in it")
        else:
            yield Member(tar, path, start, 0, inner)


def _target(link: tarfile.TarInfo, known: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The file that a link leads to, perhaps through others."""
    found: tarfile.TarInfo | None = link
    for _ in range(_MOST_LINKS):
        if found is None or not (found.issym() or found.islnk()):
            break
        folder = posixpath.dirname(found.name) if found.issym() else ""
        found = known.get(posixpath.normpath(posixpath.join(folder, found.linkname)))
    return found if found is not None and found.isfile() else None


def _check_end(file: tarfile.TarFile) -> None:
    """What follows a damaged header, or the end of an archive that another one was appended to, is never listed."""
    stream: Any = file.fileobj
    stream.seek(file.offset)
    ended = False
    while block := stream.read(tarfile.BLOCKSIZE):
        if not block.strip(b"\0"):
            ended = True
        elif not ended:
            raise tarfile.ReadError(f"it is damaged at byte {stream.tell() - len(block)}")
        else:
            _check_padding(block)


def _check_padding(block: bytes) -> None:
    """Anything may follow an archive's end, but another archive."""
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return
    raise tarfile.ReadError("another tar follows its end; expected one, as tar --concatenate makes of two")


class MemberImages:
    """Images that are members of tar files, with a class number each: what every source of such files is."""

    classes: list[str] | None = None

    def __init__(self, members: list[Member], labels: list[int], left_out: LeftOut) -> None:
        self._members, self._labels, self.left_out = members, labels, left_out

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        """The tar, and the path inside."""
        return str(self._members[index])

    def entry(self, index: int) -> str:
        """The tar's file name, the path inside, and the size."""
        member = self._members[index]
        return f"{Path(member.tar).name}:{member.path}:{member.size}"

    def label(self, index: int) -> int:
        """The class number."""
        return self._labels[index]

    def read(self, index: int) -> Image.Image:
        """Decode the member."""
        return decode(read_member(self._members[index]))


class _OpenFile:
    """Open for as long as anyone holds this object, so that no thread's file is closed while it reads."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when a process exits
        close(self.number)


# A process that is forked inherits these, open: reading at an offset leaves nothing that two processes would share.
@lru_cache(maxsize=MOST_OPEN)
def _open(path: str) -> _OpenFile:
    return _OpenFile(os.open(path, os.O_RDONLY))


def close_files() -> None:
    """Close all files of this process, as must be done before a file is read that may have been replaced."""
    _open.cache_clear()


def read_at(path: str, size: int, offset: int) -> bytes:
    """Bytes of a file. Any number of processes and threads may read at once.

    Args:
        path: of the file. It stays open until eight others have been read.
        size: number of bytes.
        offset: of the first one.

    Returns:
        The bytes; fewer where the file ends.

    Raises:
        OSError: the system's, with the file's name.
    """
    file, parts = _open(path), []
    while size > 0:  # network file systems may answer with less than was asked for
        try:
            part = os.pread(file.number, size, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error
        if not part:
            break
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)
