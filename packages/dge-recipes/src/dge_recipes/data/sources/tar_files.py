"""Random access to the members of tar files.

timm's tar reader keeps one open file for all processes forked from one, whose position they then share, and
orders files as the file system does. Here an index of offsets is made once, and reading is positional.
"""

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dge_recipes.errors import UserError

__all__ = ["Member", "MemberImages", "list_members", "read_member"]

_HANDLES: dict[tuple[int, str], int] = {}


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar file.

    Attributes:
        tar: path of the outermost tar file.
        path: its path inside; that of a tar in a tar starts with the inner tar's stem.
        offset, size: where its bytes are in `tar`.
    """

    tar: str
    path: str
    offset: int
    size: int


def list_members(tars: Sequence[Path]) -> list[Member]:
    """Every file in the tars, in the order of the tars' and then of the files' names.

    Raises:
        UserError: one of them is no plain (uncompressed) tar file.
    """
    members: list[Member] = []
    for path in sorted(tars):
        try:
            with tarfile.open(path, "r:") as file:
                found = list(_walk(file, str(path), "", 0))
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{path} cannot be read as an uncompressed tar file: {error}") from error
        members += sorted(found, key=lambda member: member.path)
    return members


def read_member(member: Member) -> bytes:
    """A file's bytes. Any number of processes may read at once."""
    key = (os.getpid(), member.tar)
    if key not in _HANDLES:
        _HANDLES[key] = os.open(member.tar, os.O_RDONLY)
    content = os.pread(_HANDLES[key], member.size, member.offset)
    if len(content) != member.size:
        raise OSError(f"{member.tar} ends inside {member.path}")
    return content


def _walk(file: tarfile.TarFile, tar: str, prefix: str, start: int) -> Iterator[Member]:
    for info in file:
        if not info.isfile():
            continue
        offset = start + info.offset_data
        if info.name.endswith(".tar") and not prefix:
            with tarfile.open(fileobj=file.extractfile(info), mode="r:") as inner:
                yield from _walk(inner, tar, f"{Path(info.name).stem}/", offset)
        else:
            yield Member(tar, prefix + info.name.removeprefix("./"), offset, info.size)


class MemberImages:
    """Images that are members of tar files, with a class number each: what every source of such files is."""

    def __init__(self, members: list[Member], labels: list[int]) -> None:
        self._members, self._labels = members, labels

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        """The tar, and the path inside."""
        return f"{self._members[index].tar}: {self._members[index].path}"

    def label(self, index: int) -> int:
        """The class number."""
        return self._labels[index]

    def read(self, index: int) -> Image.Image:
        """Decode the member."""
        image = Image.open(io.BytesIO(read_member(self._members[index])))
        image.load()
        return image
