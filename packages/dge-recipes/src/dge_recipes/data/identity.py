"""Which images a data set holds, in a few numbers that tell whether it is still the same."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dge_recipes.classes import Classes

__all__ = ["DataIdentity", "identify", "identify_images", "tell_changes"]

_SHOWN = 3
_BLOCK = 1 << 10  # entries hashed at once: one by one is slow, and many at once keep the garbage collector busy
_SHORT = 16  # hexadecimal digits of the digest of one class


@dataclass(frozen=True)
class DataIdentity:
    """What a list of images comes to. It does not depend on where the images lie.

    Attributes:
        classes: how many there are, and their names.
        num_images: images in the list.
        digest: SHA-256 of every image's entry and label, in order.
        by_class: for each class the number of its images and a digest of their entries, in order.
    """

    classes: Classes
    num_images: int
    digest: str
    by_class: tuple[tuple[int, str], ...]

    @property
    def occurring(self) -> list[int]:
        """Labels that some image has, ascending."""
        return [label for label, (count, _) in enumerate(self.by_class) if count]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = self.classes.names
        return {
            "num_classes": self.classes.count,
            "classes": None if names is None else list(names),
            "num_images": self.num_images,
            "digest": self.digest,
            "by_class": [list(each) for each in self.by_class],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "DataIdentity":
        """The inverse of :meth:`as_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        classes = Classes(int(content["num_classes"]), content["classes"])
        by_class = tuple((int(count), str(digest)) for count, digest in content["by_class"])
        return cls(classes, int(content["num_images"]), str(content["digest"]), by_class)


def identify(entries: Iterable[tuple[str, int]], classes: Classes) -> DataIdentity:
    """Read a list of images through.

    Args:
        entries: what tells an image from the others, and its label, below ``classes.count``.
        classes: of the labels.
    """
    whole, counts = hashlib.sha256(), [0] * classes.count
    digests = [hashlib.sha256() for _ in counts]
    rest = iter(entries)
    while block := list(islice(rest, _BLOCK)):
        names, labels = zip(*block, strict=True)
        whole.update(_bytes(names) + _bytes(map(str, labels)))
        by_label: dict[int, list[str]] = {}
        for entry, label in block:
            by_label.setdefault(label, []).append(entry)
        for label, found in by_label.items():
            digests[label].update(_bytes(found))
            counts[label] += len(found)
    by_class = tuple(zip(counts, (each.hexdigest()[:_SHORT] for each in digests), strict=True))
    return DataIdentity(classes, sum(counts), whole.hexdigest(), by_class)


def identify_images(entries: Iterable[tuple[str, Collection[int]]], classes: Classes) -> DataIdentity:
    """Read a list of images through that may show any number of classes each.

    Args:
        entries: what tells an image, with all that is known to be in it, from the others; and the different classes
            that it shows, each below ``classes.count``, or none where nobody looked.
        classes: that images can show.

    Returns:
        The identity. A class's number is that of the images that show it.
    """
    whole, counts, total = hashlib.sha256(), [0] * classes.count, 0
    digests = [hashlib.sha256() for _ in counts]
    for entry, labels in entries:
        total += 1
        whole.update(_bytes((entry, *map(str, labels))))
        for label in labels:
            counts[label] += 1
            digests[label].update(_bytes((entry,)))
    by_class = tuple(zip(counts, (each.hexdigest()[:_SHORT] for each in digests), strict=True))
    return DataIdentity(classes, total, whole.hexdigest(), by_class)


def tell_changes(before: DataIdentity, now: DataIdentity) -> str:
    """In words, how two different lists of images of the same classes differ."""
    names = before.classes.names or [str(number) for number in range(before.classes.count)]
    told = []
    for name, (count, digest), (count_now, digest_now) in zip(names, before.by_class, now.by_class, strict=True):
        if count != count_now:
            told.append(f"class {name} had {count} images and has {count_now}")
        elif digest != digest_now:
            told.append(f"class {name} has other images, or the same in another order")
    if not told and before.num_images != now.num_images:
        return f"there were {before.num_images} images and are {now.num_images}"
    if not told:
        classified = sum(count for count, _ in now.by_class) >= now.num_images
        return "the images come in another order" if classified else "the images are others, or come in another order"
    more = f", and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return f"{', '.join(told[:_SHOWN])}{more}"


def _bytes(texts: Iterable[str]) -> bytes:
    """Texts, each ended by a zero, which no path holds; file names may hold bytes that are no text."""
    return "\0".join((*texts, "")).encode("utf-8", "surrogatepass")
