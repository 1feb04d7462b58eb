"""Results of single images, brought together from all processes: each image counts once on any number of them."""

from collections.abc import Mapping
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from dge_recipes.data.images import SourceImages
from dge_recipes.errors import UserError

__all__ = ["UNREAD", "gather_images"]

T = TypeVar("T")

UNREAD = None  # what is known of an image that could not be read


def gather_images(
    results: Mapping[int, T | None], accelerator: Accelerator, num_images: int, dataset: Any = None
) -> dict[int, T]:
    """What the processes know of their images. Every process calls it.

    Accelerate pads the last batches with images of the first ones; such a double is dropped here, by its number.

    Args:
        results: by the image's place in the set; :data:`UNREAD` for one that could not be read.
        accelerator: of this run.
        num_images: images in the set.
        dataset: the set, which is asked whether too many could not be read.

    Returns:
        The same in every process, in the order of the places, without the images that could not be read.

    Raises:
        RuntimeError: the images met are not those of the set.
        UserError: none of the images could be read, or fewer than the data set's ``max_unreadable`` asks for.
    """
    gathered: list[tuple[int, T | None]] = gather_object(list(results.items()))
    every = dict(gathered)
    if sorted(every) != list(range(num_images)):
        raise RuntimeError(f"evaluated {len(every)} different images, but the data set has {num_images}")
    found = {place: every[place] for place in range(num_images)}
    known = {place: result for place, result in found.items() if result is not None}
    if not known:
        raise UserError(f"none of the {num_images} held-out images can be read")
    if isinstance(dataset, SourceImages):  # a process alone meets only its share of them
        dataset.check_skipped(num_images - len(known))
    return known
