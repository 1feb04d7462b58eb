"""Images in tar files, labelled by the folder or the tar that they are in."""

import posixpath
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Literal

from dge_recipes.data.image_files import LeftOut, extension, image_extensions, is_hidden, visible_files
from dge_recipes.data.section import ImageData, ImageSource, Part
from dge_recipes.data.tar_files import Member, MemberImages, list_members
from dge_recipes.errors import UserError

__all__ = ["TarData", "TarSource"]


class TarData(ImageData):
    """Tar files of images: root/train.tar or root/train/*.tar, and val likewise; a folder or tar is a class."""

    name: Literal["tar"]

    def open(self, part: Part) -> ImageSource:
        """The images of a part."""
        return TarSource(self.folder, part)


class TarSource(MemberImages):
    """Images in one tar file or in several; also tars inside a tar, as ImageNet is published.

    An image's class is the innermost folder that it is in, else the inner tar, else the tar. A data set may be divided
    among tars, so folders of one name in several of them are one class. In one tar they are two things of which
    nobody knows whether they are one class, which is an error.

    Args:
        root: holds ``train.tar`` or ``train/*.tar``, and ``val`` likewise.
        part: ``train`` or ``val``.

    Raises:
        UserError: no such files, or both of them; a tar without images; an image whose class or content can be one of
            two.
    """

    def __init__(self, root: Path, part: str) -> None:
        left_out = LeftOut()
        tars = _find_tars(root, part, left_out)
        members, extensions = list_members(tars), image_extensions()
        images = [member for member in members if extension(member.path) in extensions]
        for member in members:
            if extension(member.path) not in extensions:
                left_out.add(member.path, str(member))
        if not images:
            raise UserError(f"the tar files of {root} hold no images for {part}; left out: {left_out}")
        _check_used(tars, members, images)
        _check_names(images)
        _check_folders(images)
        names = [_class_name(image) for image in images]
        self.classes = sorted(set(names))
        self.num_classes = len(self.classes)
        places = {name: place for place, name in enumerate(self.classes)}
        super().__init__(images, [places[name] for name in names], left_out)


def _find_tars(root: Path, part: str, left_out: LeftOut) -> list[Path]:
    single, folder = root / f"{part}.tar", root / part
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    tars = [path for path in inside if path.is_file() and extension(path.name) == ".tar" and not is_hidden(path.name)]
    if single.is_file():
        if tars:
            raise UserError(f"both {single} and {tars[0]} are there; expected one tar, or a folder of tars")
        return [single]
    if not tars:
        raise UserError(f"no tar files at {root}; expected {single} or {folder}/*.tar")
    used = {str(path) for path in tars}
    for path in visible_files(folder):
        if path not in used:
            left_out.add(path)
    return tars


def _class_name(member: Member) -> str:
    return PurePosixPath(member.path).parent.name or Path(member.tar).stem


def _check_used(tars: Sequence[Path], members: Sequence[Member], images: Sequence[Member]) -> None:
    """A tar can be a class; one without images would be missing from the classes."""
    used = {(image.tar, inner) for image in images for inner in ("", image.inner)}
    for tar, inner in sorted({(str(tar), "") for tar in tars} | {(member.tar, member.inner) for member in members}):
        if (tar, inner) not in used:
            held = LeftOut()
            for member in members:
                if (member.tar, member.inner) == (tar, inner):
                    held.add(member.path)
            raise UserError(f"{_where(tar, inner)} holds no images; left out: {held}")


def _check_names(images: Sequence[Member]) -> None:
    """One name stands for one image; in the order of names, equal ones are neighbours."""
    for first, second in pairwise(images):
        if (first.tar, first.inner, first.path) == (second.tar, second.inner, second.path):
            raise UserError(f"{first} is in it twice; expected every name once (tar --append keeps the older file too)")


def _check_folders(images: Sequence[Member]) -> None:
    """In one tar, two folders of images may neither have one name nor lie in one another."""
    classes: dict[tuple[str, str], dict[str, str]] = {}  # by tar and inner tar: name by place
    for image in images:
        folder = posixpath.dirname(image.path)
        if image.inner:
            folder = folder.partition("/")[2]  # without the inner tar's stem
            if not folder:  # then the inner tar is a class, in the place of a folder of the outer one
                classes.setdefault((image.tar, ""), {})[image.inner] = PurePosixPath(image.inner).stem
        classes.setdefault((image.tar, image.inner), {})[folder] = posixpath.basename(folder)
    for (tar, inner), names in classes.items():
        _check_apart(_where(tar, inner), names)


def _check_apart(where: str, names: Mapping[str, str]) -> None:
    places: dict[str, str] = {}
    for place in sorted(names):
        parents = [str(parent) for parent in PurePosixPath(place).parents] if place else []
        for parent in ("" if parent == "." else parent for parent in parents):
            if parent in names:
                beside = f"in its folder {parent}" if parent else "outside of folders"
                raise UserError(f"{where} holds images {beside} and in {place}; expected a folder for every class")
        other = places.setdefault(names[place], place)
        if other != place:
            both = f"{where}: the images of {other} and of {place}"
            raise UserError(f"{both} would be one class, {names[place]}; expected a name for every class")


def _where(tar: str, inner: str) -> str:
    return f"{tar}: {inner}" if inner else tar
