"""WebDataset shards, read in any order through an index of their members."""

import json
from pathlib import Path

from timm.data.readers.img_extensions import get_img_extensions

from dge_recipes.config.data_sets import WebDatasetData
from dge_recipes.data.sources.tar_files import Member, MemberImages, list_members, read_member
from dge_recipes.errors import UserError

__all__ = ["WebDatasetSource"]


class WebDatasetSource(MemberImages):
    """Samples KEY.jpg (or another image type) with KEY.cls or KEY.json.

    Streaming, as the WebDataset library does, cannot continue exactly in the middle of an epoch; random
    access can.

    Args:
        config: where the shards are and how labels are called.
        shards: pattern of the shards below ``config.root``.

    Raises:
        UserError: no such shards, an image without a label, or a label that is no class number.
    """

    def __init__(self, config: WebDatasetData, shards: str) -> None:
        root = Path(config.root).expanduser()
        tars = sorted(root.glob(shards))
        if not tars:
            raise UserError(f"no WebDataset shards at {root / shards}")
        super().__init__([], [])
        for key, parts in _samples(list_members(tars)).items():
            images = [part for kind, part in parts.items() if f".{kind.rpartition('.')[2].lower()}" in _IMAGES]
            if images:
                self._members.append(images[0])
                self._labels.append(_label(key, parts, config.label_key))
        if not self._members:
            raise UserError(f"the shards {root / shards} hold no images")
        self.num_classes = max(self._labels) + 1 if config.num_classes is None else config.num_classes
        wrong = [label for label in self._labels if not 0 <= label < self.num_classes]
        if wrong:
            raise UserError(f"{root / shards}: got label {wrong[0]}, expected 0 to {self.num_classes - 1}")


_IMAGES = get_img_extensions(as_set=True)


def _samples(members: list[Member]) -> dict[tuple[str, str], dict[str, Member]]:
    """Members by shard and key, then by what follows the key's first dot."""
    samples: dict[tuple[str, str], dict[str, Member]] = {}
    for member in members:
        folder, slash, file = member.path.rpartition("/")
        key, _, kind = file.partition(".")
        samples.setdefault((member.tar, folder + slash + key), {})[kind] = member
    return samples


def _label(key: tuple[str, str], parts: dict[str, Member], label_key: str) -> int:
    try:
        if "cls" in parts:
            return int(read_member(parts["cls"]))
        return int(json.loads(read_member(parts["json"]))[label_key])
    except (KeyError, TypeError, ValueError) as error:
        expected = f"a number in {key[1]}.cls, or in {key[1]}.json as {label_key!r}"
        raise UserError(f"{key[0]}: {key[1]} has no label; expected {expected}") from error
