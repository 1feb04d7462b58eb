"""Images in tar files, labelled by the folder or the tar that they are in."""

from pathlib import Path

from timm.data.readers.img_extensions import get_img_extensions

from dge_recipes.data.sources.tar_files import Member, MemberImages, list_members
from dge_recipes.errors import UserError

__all__ = ["TarSource"]


class TarSource(MemberImages):
    """Images in one tar file or in several; also tars inside a tar, as ImageNet is published.

    An image's class is the innermost folder that it is in, else the inner tar, else the tar.

    Args:
        root: holds ``train.tar`` or ``train/*.tar``, and ``val`` likewise.
        part: ``train`` or ``val``.

    Raises:
        UserError: no such files, or no images in them.
    """

    def __init__(self, root: Path, part: str) -> None:
        single, folder = root / f"{part}.tar", root / part
        tars = [single] if single.is_file() else sorted(folder.glob("*.tar"))
        if not tars:
            raise UserError(f"no tar files at {root}; expected {single} or {folder}/*.tar")
        extensions = get_img_extensions(as_set=True)
        members = [each for each in list_members(tars) if Path(each.path).suffix.lower() in extensions]
        if not members:
            raise UserError(f"the tar files of {root} hold no images for {part}")
        names = [_class_name(member) for member in members]
        self.classes = sorted(set(names))
        places = {name: place for place, name in enumerate(self.classes)}
        super().__init__(members, [places[name] for name in names])
        self.num_classes = len(self.classes)


def _class_name(member: Member) -> str:
    folder = Path(member.path).parent.name
    return folder or Path(member.tar).stem
