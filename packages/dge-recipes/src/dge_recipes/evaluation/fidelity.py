"""How much of the dense model's answers a student keeps on held-out pictures, each picture counted once."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from dge_recipes.compress.fidelity import Fidelity, answers_of, compare
from dge_recipes.data import HeldOutData
from dge_recipes.data.picture_loaders import NumberedImages, numbers_of
from dge_recipes.data.workers import watched
from dge_recipes.errors import UserError

__all__ = ["FidelityEvaluation", "evaluate_fidelity"]


@dataclass(frozen=True)
class FidelityEvaluation:
    """What an evaluation found.

    Attributes:
        images: pictures evaluated.
        kept: of the dense model's answers, and the MAC ratio.
        macs: mean multiply-accumulates per picture of the whole model.
        unreadable: pictures of the set that could not be read, and are in none of the other numbers.
    """

    images: int
    kept: Fidelity
    macs: float
    unreadable: int = 0

    @property
    def mac_ratio(self) -> float:
        """MACs over the dense model's."""
        return self.kept.mac_ratio

    @property
    def score(self) -> float:
        """:attr:`~dge_recipes.compress.fidelity.Fidelity.score`, or 0 where that is negative."""
        return max(self.kept.score, 0.0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rest = {"macs": self.macs, "unreadable": self.unreadable}
        return {"images": self.images, "fidelity": self.score, **asdict(self.kept), **rest}


def evaluate_fidelity(
    dense: nn.Module,
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Accelerator,
    held_out: HeldOutData,
    after_batch: Callable[[], None] = lambda: None,
) -> FidelityEvaluation:
    """Compare a model with the dense one, each process on its share of the pictures.

    Every process sees the batches that one process alone would see, and the numbers of all pictures are added up in
    the order of the set: the result is the same to the last bit on any number of processes of equal devices.

    Args:
        dense: in evaluation mode, on the accelerator's device.
        model: without wrappers, likewise on the device; its mode is restored.
        loader: of :class:`~dge_recipes.data.picture_loaders.NumberedImages`, as prepared.
        accelerator: of this run.
        held_out: the set.
        after_batch: called in every process; what it raises ends the evaluation.

    Raises:
        RuntimeError: a picture was not met.
        UserError: none of the pictures can be read, or fewer than ``data.max_unreadable`` asks for.
    """
    was_training = model.training
    model.eval()
    rows: list[tuple[int, list[float] | None]] = []
    with torch.no_grad():
        for number, (images, labels) in enumerate(watched(loader)):
            batch = number * accelerator.num_processes + accelerator.process_index
            images, labels = _own(images, labels, batch, held_out.loader.batch_size or 1)
            if len(images):
                with accelerator.autocast():
                    found = compare(model, images, answers_of(dense, images)).tolist()
                numbers, blank = numbers_of(labels)
                for each, unreadable, values in zip(numbers.tolist(), blank.tolist(), found, strict=True):
                    rows.append((each, None if unreadable else values))
            after_batch()
    model.train(was_training)
    every = sorted(gather_object(rows), key=lambda row: row[0])
    if [number for number, _ in every] != list(range(held_out.num_images)):
        raise RuntimeError(f"evaluated {len(every)} pictures, but the data set has {held_out.num_images}")
    readable = [values for _, values in every if values is not None]
    if not readable:
        raise UserError(f"none of the {held_out.num_images} held-out pictures can be read")
    unreadable_images = held_out.num_images - len(readable)
    if isinstance(held_out.loader.dataset, NumberedImages):  # a process alone meets only its share of them
        held_out.loader.dataset.check_skipped(unreadable_images)
    macs, ratio, class_cosine, token_cosine, same = torch.tensor(readable, dtype=torch.float64).mean(0).tolist()
    kept = Fidelity(ratio, class_cosine, token_cosine, same if getattr(dense, "num_classes", 0) else None)
    return FidelityEvaluation(len(readable), kept, macs, unreadable_images)


def _own(images: Tensor, labels: Tensor, batch: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """A batch without the pictures that Accelerate repeats to make batches even."""
    numbers, seen, places = numbers_of(labels)[0].tolist(), set[int](), []
    for place, number in enumerate(numbers):
        if number // batch_size == batch and number not in seen:
            seen.add(number)
            places.append(place)
    return images[places], labels[places]
