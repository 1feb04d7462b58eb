"""WebDataset shards, read in any order through an index of their members."""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dge_recipes.data.image_files import LeftOut, extension, image_extensions, is_hidden
from dge_recipes.data.section import ImageData, ImageSource, Part
from dge_recipes.data.tar_files import Member, MemberImages, list_members, read_member
from dge_recipes.errors import UserError

__all__ = ["WebDatasetData", "WebDatasetSource"]


class WebDatasetData(ImageData):
    """WebDataset shards: KEY.jpg beside KEY.cls, or KEY.json with a label."""

    name: Literal["webdataset"]
    train_shards: str = Field(default="train*.tar", description="training shards below root (webdataset)")
    held_out_shards: str = Field(default="val*.tar", description="held-out shards below root (webdataset)")
    image_key: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="which part of a sample is its image, such as jpg or rgb.png; null: KEY.EXT, else the only "
        "KEY.PART.EXT (webdataset)",
    )
    label_key: str | None = Field(
        default="label", description="where a KEY.json holds the label; null: by KEY.cls alone (webdataset)"
    )

    def open(self, part: Part) -> ImageSource:
        """The images of a part."""
        return WebDatasetSource(self, self.train_shards if part == "train" else self.held_out_shards)


@dataclass(frozen=True, slots=True)
class _Sample:
    """Members of one key.

    Attributes:
        key: what is before the first dot of their names, with the folders.
        parts: they, by what is behind that dot in lower case; several may have one name.
    """

    shard: Path
    key: str
    parts: dict[str, list[Member]] = field(default_factory=dict)

    def __str__(self) -> str:
        """For messages."""
        return f"{self.shard}: {self.key}"

    def members(self) -> list[Member]:
        """All of them."""
        return [member for same in self.parts.values() for member in same]


class WebDatasetSource(MemberImages):
    """Samples KEY.jpg (or another image type) with KEY.cls or KEY.json.

    KEY.EXT is the image, whatever KEY.PART.EXT there are beside it; a sample of several images needs
    ``config.image_key``. Streaming, as the WebDataset library does, cannot continue exactly in the middle of an epoch;
    random access can.

    Args:
        config: where the shards are, and what images and labels are called.
        shards: pattern of the shards below ``config.root``.

    Raises:
        UserError: no such shards; a sample of which nobody knows which member is the image; one without a label, with
            two that differ, or with one that is no class number.
    """

    def __init__(self, config: WebDatasetData, shards: str) -> None:
        root = config.folder
        members, labels, left_out = [], [], LeftOut()
        extensions = image_extensions()
        for shard in _find_shards(root, shards):  # one by one, so that only images stay in memory
            for sample in _samples(shard):
                image = _image(sample, config.image_key, extensions)
                if image is None:
                    for member in sample.members():
                        left_out.add(member.path, str(member))
                else:
                    members.append(image)
                    labels.append(_label(sample, config.label_key))
        if not members:
            raise UserError(f"the shards {root / shards} hold no images; left out: {left_out}")
        if config.image_key is None:
            _check_one_form(members)
        super().__init__(members, labels, left_out)
        self.num_classes = max(labels) + 1 if config.num_classes is None else config.num_classes
        wrong = [label for label in labels if not 0 <= label < self.num_classes]
        if wrong:
            raise UserError(f"{root / shards}: got label {wrong[0]}, expected 0 to {self.num_classes - 1}")


def _find_shards(root: Path, shards: str) -> list[Path]:
    """Those that the pattern means; hidden ones where it names hidden ones."""
    try:
        found = sorted(root.glob(shards))
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"got {shards!r} for shards, expected a pattern below data.root, such as train*.tar") from error
    tars = [path for path in found if is_hidden(shards) or not is_hidden(path.relative_to(root).as_posix())]
    if not tars:
        raise UserError(f"no WebDataset shards at {root / shards}")
    return tars


def _samples(shard: Path) -> Iterable[_Sample]:
    samples: dict[tuple[str, str], _Sample] = {}
    for member in list_members([shard]):
        key, kind = _split(member)
        sample = samples.setdefault((member.inner, key), _Sample(shard, key))
        sample.parts.setdefault(kind.lower(), []).append(member)
    return samples.values()


def _split(member: Member) -> tuple[str, str]:
    """Key and part."""
    folder, slash, file = member.path.rpartition("/")
    key, _, kind = file.partition(".")
    return folder + slash + key, kind


def _image(sample: _Sample, image_key: str | None, extensions: Collection[str]) -> Member | None:
    """The image of a sample, or None where it has none."""
    images = [member for member in sample.members() if extension(member.path) in extensions]
    if image_key is None:
        found = [image for image in images if "." not in _split(image)[1]] or images
    else:
        found = sample.parts.get(image_key.lower().removeprefix("."), [])
        if images and not found:
            raise UserError(
                f"{sample} has no {image_key!r}, the part that data.image_key names; it has {_list(images)}"
            )
    if len(found) > 1:
        kinds = sorted({_split(image)[1].lower() for image in found})
        hint = f"one, or data.image_key={kinds[0]}" if len(kinds) > 1 else f"one that is data.image_key={kinds[0]}"
        raise UserError(f"{sample} has several images, {_list(found)}; expected {hint}")
    return found[0] if found else None


def _list(members: Iterable[Member]) -> str:
    return ", ".join(member.path for member in members)


def _check_one_form(images: Iterable[Member]) -> None:
    """A KEY.depth.png whose KEY.jpg was lost must not take its place."""
    forms: dict[bool, Member] = {}
    for image in images:
        forms.setdefault("." in _split(image)[1], image)
    if len(forms) == 2:
        both = f"{forms[False]} is the image of one sample and {forms[True]} of another"
        raise UserError(f"{both}; expected KEY.EXT in all or KEY.PART.EXT in all, or data.image_key")


def _label(sample: _Sample, label_key: str | None) -> int:
    cls, described = sample.parts.get("cls", []), sample.parts.get("json", [])
    for same in (cls, described):
        if len(same) > 1:
            raise UserError(f"{sample} has several labels, {_list(same)}; expected one")
    try:
        label = int(read_member(cls[0])) if cls else _whole(_content(described[0])[label_key])
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        expected = f"a number in {sample.key}.cls" + (
            f", or in {sample.key}.json as {label_key!r}" if label_key is not None else ""
        )
        raise UserError(f"{sample} has no label; expected {expected}") from error
    if cls and described and label_key is not None:
        _check_agrees(label, cls[0], described[0], label_key)
    return label


def _content(member: Member) -> Any:
    return json.loads(read_member(member))


def _whole(value: Any) -> int:
    number = int(value)
    if isinstance(value, float) and value != number:
        raise ValueError(f"got {value}, expected a whole number")
    return number


def _check_agrees(label: int, cls: Member, described: Member, label_key: str) -> None:
    """KEY.json may say anything, but not another class number than KEY.cls does."""
    try:
        other = _content(described)[label_key]
    except (KeyError, TypeError, ValueError):
        return
    if isinstance(other, (int, float)) and other != label:
        both = f"{cls} says {label} and {described.path} says {other} for {label_key!r}"
        raise UserError(f"{both}; expected one label, or data.label_key=null to go by KEY.cls alone")
