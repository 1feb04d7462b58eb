"""Which images a run is trained and evaluated on: recorded in every checkpoint, compared when it is resumed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from dge_recipes.checkpoints.training_state import DATA_FILE, read_progress
from dge_recipes.classes import Classes, tell_difference
from dge_recipes.data import DataIdentity, HeldOutData, TrainingData
from dge_recipes.data.identity import tell_changes
from dge_recipes.errors import UserError

__all__ = ["RunData", "check_same_everywhere", "continue_data"]

_PARTS = {"train": "training images", "val": "held-out images"}


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        parts: of each part, ``train`` and ``val``, which images it holds.
        changes: each time that a run went on with other images: at which step, and what each part was before and
            became.
    """

    parts: Mapping[str, DataIdentity]
    changes: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, training: TrainingData, held_out: HeldOutData) -> "RunData":
        """From the two data sets."""
        return cls({"train": training.identity, "val": held_out.identity})

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the classes that the run trains on."""
        return self.parts["train"].classes.names

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint's JSON."""
        parts = {name: identity.as_dict() for name, identity in self.parts.items()}
        return {**parts, "changes": list(self.changes)}

    def facts(self) -> dict[str, Any]:
        """For the summary."""
        names = self.label_names
        parts = {name: _short(identity) for name, identity in self.parts.items()}
        data = {"classes": None if names is None else list(names), **parts}
        return {"data": data, "data_changed": list(self.changes)}


def continue_data(now: RunData, checkpoint: Path, *, accept: bool) -> RunData:
    """Compare the images of a run with those that a checkpoint of it was trained on.

    Args:
        now: the images there are.
        checkpoint: its folder. Those of earlier versions say nothing of their images, and are not compared.
        accept: other images of the same classes are fine.

    Returns:
        The data of the run that goes on, with its changes.

    Raises:
        UserError: the images are others and `accept` is False, or the classes are.
    """
    before = _read(checkpoint)
    if before is None:
        return now
    other = _tell_classes(before.parts["train"].classes, now.parts["train"].classes)
    if other is not None:  # other outputs of the network
        way_out = "rename them back, or start a new run from this one with model.init_from"
        raise UserError(f"cannot continue {checkpoint}: the classes of its training images {other}; {way_out}")
    differ = {name: _tell(before.parts[name], identity) for name, identity in now.parts.items()}
    different = {name: told for name, told in differ.items() if told is not None}
    if not different:
        return replace(now, changes=before.changes)
    told = "; ".join(f"{_PARTS[name]}: {what}" for name, what in different.items())
    if not accept:
        raise UserError(
            f"cannot continue {checkpoint}: its data have changed: {told}; data.changed=accept goes on with these"
        )
    step = read_progress(checkpoint)["step"]
    parts = {name: [_short(each.parts[name]) for each in (before, now)] for name in different}
    return replace(now, changes=(*before.changes, {"step": step, "what": told, **parts}))


def check_same_everywhere(data: RunData, accelerator: Accelerator) -> None:
    """Every process must see the same images under the same numbers. Every process calls it.

    Raises:
        UserError: one of them sees others than the main process.
    """
    own = {name: (identity.classes, identity.num_images, identity.digest) for name, identity in data.parts.items()}
    seen: list[dict[str, tuple[Classes, int, str]]] = gather_object([own])
    for number, each in enumerate(seen):
        for name, what in _PARTS.items():
            (classes, count, _), (here, count_here, _) = seen[0][name], each[name]
            if each[name] != seen[0][name]:
                differ = _tell_classes(classes, here) or f"{count} and {count_here}, or of other names"
                raise UserError(
                    f"processes 0 and {number} see other {what}: {differ}; every machine needs the same files"
                )


def _tell(before: DataIdentity, now: DataIdentity) -> str | None:
    """In words, how a part differs from what it was; None if it does not. Held-out images may lack classes."""
    classes = _tell_classes(before.classes, now.classes)
    if classes is not None:
        return f"their classes {classes}"
    return None if before.digest == now.digest else tell_changes(before, now)


def _tell_classes(before: Classes, now: Classes) -> str | None:
    if before.names is not None and now.names is not None and before.names != now.names:
        return tell_difference("were", before.names, "are", now.names)
    return None if before.count == now.count else f"were {before.count}; are {now.count}"


def _read(checkpoint: Path) -> RunData | None:
    path = checkpoint / DATA_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: DataIdentity.from_dict(content[name]) for name in _PARTS}
        return RunData(parts, tuple(content["changes"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {checkpoint}: {DATA_FILE} cannot be read: {error}") from error


def _short(identity: DataIdentity) -> dict[str, Any]:
    return {"num_images": identity.num_images, "digest": identity.digest}
