"""Images in tar files, labelled by the folder or the tar that they are in."""

import io
from pathlib import Path

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from dge_recipes.data.sources.tar_files import Member, list_members, read_member
from dge_recipes.errors import UserError

__all__ = ["TarSource"]


class TarSource:
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
        self._members = [each for each in list_members(tars) if Path(each.path).suffix.lower() in extensions]
        if not self._members:
            raise UserError(f"the tar files of {root} hold no images for {part}")
        names = [_class_name(member) for member in self._members]
        self.classes = sorted(set(names))
        places = {name: place for place, name in enumerate(self.classes)}
        self._labels = [places[name] for name in names]
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        """The tar, and the path inside."""
        return f"{self._members[index].tar}: {self._members[index].path}"

    def label(self, index: int) -> int:
        """Place of the class in :attr:`classes`."""
        return self._labels[index]

    def read(self, index: int) -> Image.Image:
        """Decode the member."""
        image = Image.open(io.BytesIO(read_member(self._members[index])))
        image.load()
        return image


def _class_name(member: Member) -> str:
    folder = Path(member.path).parent.name
    return folder or Path(member.tar).stem
