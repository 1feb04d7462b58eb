"""What class numbers mean: a model's outputs and a data set's labels meet by the names of the classes."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from dge_recipes.errors import UserError

__all__ = ["ClassMatch", "Classes", "match_classes", "tell_difference"]

_MOST, _SHOWN = 12, 5  # a list is told whole up to the one, else begun with the other
_PLAIN = re.compile(r"[^\s,;:()'\"](?:[^,;:()'\"\r\n]*[^\s,;:()'\"])?")  # needs no quotes in a list


@dataclass(frozen=True)
class Classes:
    """The classes that a model tells apart, or that a data set has.

    Attributes:
        count: how many.
        names: of each number; None where nothing names them. Unicode has several spellings of one name, between
            which file systems choose: here all are in normal form C.
    """

    count: int
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.names is not None:
            object.__setattr__(self, "names", tuple(unicodedata.normalize("NFC", name) for name in self.names))


@dataclass(frozen=True)
class ClassMatch:
    """How the labels of a data set meet the outputs of a model.

    Attributes:
        by: ``name``, or ``number`` where one side has no names.
        count: classes that an evaluation tells apart.
        outputs: the model's outputs that stand for them; None: all, and label k is output k.
        places: of each label of the data set, its place among `outputs`; -1 where no image has it.
    """

    by: Literal["name", "number"]
    count: int
    outputs: tuple[int, ...] | None = None
    places: tuple[int, ...] | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Bring both together.

        Args:
            logits: float [B, outputs of the model].
            labels: int64 [B], of the data set; negative ones stay what they are.

        Returns:
            Logits float [B, count], and labels int64 [B] below `count`.
        """
        if self.outputs is None or self.places is None:
            return logits, labels
        outputs, places = (torch.tensor(each, device=logits.device) for each in (self.outputs, self.places))
        return logits[:, outputs], torch.where(labels < 0, labels, places[labels.clamp(min=0)])


def match_classes(
    model: Classes,
    data: Classes,
    occurring: Sequence[int],
    *,
    subset: bool = False,
    known: str = "the weights know",
    shown: str = "the images show",
    ways_out: bool = True,
) -> ClassMatch:
    """Match what a model knows with what a data set shows. The same names in another order are matched.

    Args:
        model: classes of the outputs.
        data: classes of the labels.
        occurring: labels that some image has, ascending.
        subset: the data set may lack classes that the model knows; then those that occur alone compete. Weights
            without names are taken as ImageNet's if they have as many outputs, and the data set's names are synsets.
        known, shown: subject and verb of the two sides, for errors.
        ways_out: errors name the keys of an evaluation that help.

    Raises:
        UserError: the classes are others, or fewer without `subset`.
    """
    names = model.names
    if subset and names is None and data.names is not None:
        names = _imagenet_names(model.count, data.names)
    if names is None or data.names is None:
        if subset and data.names is None and max(occurring) < model.count:
            return _select("number", model, range(model.count), occurring)
        _check_count(model, data, subset, known, shown, ways_out)
        return ClassMatch("number", model.count)
    if names != data.names:
        fewer, others = set(names) - set(data.names), set(data.names) - set(names)
        if others or (fewer and not subset):
            hint = "" if others or not ways_out else "; data.classes=subset evaluates among the shown classes alone"
            raise UserError(tell_difference(known, names, shown, data.names) + hint)
        for side, each in ((known, names), (shown, data.names)):
            if len(set(each)) < len(each):
                twice = next(name for name in each if each.count(name) > 1)
                raise UserError(f"{side} two classes called {_quoted(twice)}: they cannot be matched by their names")
    places = {name: place for place, name in enumerate(names)}
    numbers = range(model.count) if names == data.names else [places[name] for name in data.names]
    return _select("name", model, numbers, occurring if subset else range(data.count))


def tell_difference(known: str, first: Sequence[str], shown: str, second: Sequence[str]) -> str:
    """Two different lists of class names, and what is in one of them alone, all shortened.

    Args:
        known, shown: what comes before the lists, such as ``the weights know``.
        first, second: the lists.
    """
    missing, unknown = _without(first, second), _without(second, first)
    parts = [f"{what}: {_shown(some)}" for what, some in (("missing", missing), ("unknown", unknown)) if some]
    if not parts:
        pairs = enumerate(zip_longest(first, second, fillvalue=""))
        place, (one, other) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        parts = [f"in another order: number {place} is {_quoted(one)} and {_quoted(other)}"]
    return f"{known} {_shown(first)}; {shown} {_shown(second)} ({'; '.join(parts)})"


def _check_count(model: Classes, data: Classes, subset: bool, known: str, shown: str, ways_out: bool) -> None:
    """Without names on one side, both must have as many classes."""
    if subset and data.names is not None:
        raise UserError(f"data.classes=subset finds classes by their names, but {known} {model.count} without names")
    if model.count != data.count:
        told = f"{known} {_counted(model)}; {shown} {_counted(data)}"
        if data.names is None and ways_out:
            told += "; data.num_classes says how many there are, data.classes=subset that some of them are not shown"
        raise UserError(told)


def _select(by: Literal["name", "number"], model: Classes, numbers: Sequence[int], labels: Sequence[int]) -> ClassMatch:
    """Have the outputs of some labels compete; ``numbers[label]`` is a label's output."""
    outputs = tuple(numbers[label] for label in labels)
    if outputs == tuple(range(model.count)):
        return ClassMatch(by, model.count)
    places = [-1] * len(numbers)
    for place, label in enumerate(labels):
        places[label] = place
    return ClassMatch(by, len(outputs), outputs, tuple(places))


def _imagenet_names(count: int, wanted: Sequence[str]) -> tuple[str, ...] | None:
    """ImageNet's names of its classes, if it has an edition with so many, and the wanted ones are among them."""
    edition = infer_imagenet_subset({"num_classes": count})
    names = () if edition is None else tuple(ImageNetInfo(edition).label_names())
    return names if set(wanted) <= set(names) else None


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _counted(classes: Classes) -> str:
    named = "without names" if classes.names is None else f"({_shown(classes.names)})"
    return f"{classes.count} {'class' if classes.count == 1 else 'classes'} {named}"


def _shown(names: Sequence[str]) -> str:
    if len(names) <= _MOST:
        return ", ".join(map(_quoted, names))
    return f"{', '.join(map(_quoted, names[:_SHOWN]))} and {len(names) - _SHOWN} more"


def _quoted(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else repr(name)
