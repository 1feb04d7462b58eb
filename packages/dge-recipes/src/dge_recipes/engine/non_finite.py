"""Losses that are not finite: noticed without slowing the run, and kept so that they can be looked into."""

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dge_recipes.engine.losses import LOSS_NAMES
from dge_recipes.engine.progress import StepPosition
from dge_recipes.errors import UserError

__all__ = ["BAD_BATCHES", "BadBatch", "LossWatch", "gradients_finite", "tell_first"]

BAD_BATCHES = "bad_batches"


@dataclass(frozen=True)
class BadBatch:
    """A batch whose loss is not finite. Images and targets are tensors, or lists and dicts of them."""

    place: StepPosition
    terms: dict[str, float]
    images: Any
    targets: Any

    def save(self, folder: Path, seed: int) -> Path:
        """Write images, targets and where they occurred to a safetensors file.

        Args:
            folder: the run's folder.
            seed: the run's.

        Returns:
            The file, with the tensors ``images`` and ``targets``; of lists and dicts those inside, such as
            ``targets.0.boxes``. Its metadata hold, as JSON text, ``step``, ``position`` (epoch, forward, process),
            ``seed`` and ``terms``.

        Raises:
            UserError: it cannot be written.
        """
        path = folder / BAD_BATCHES / f"step_{self.place.step:08d}_process_{self.place.position[2]}.safetensors"
        facts = {"step": self.place.step, "position": self.place.position, "seed": seed}
        metadata = {name: json.dumps(value) for name, value in facts.items()}
        metadata["terms"] = json.dumps({name: repr(value) for name, value in self.terms.items()})
        named = (*_named_tensors("images", self.images), *_named_tensors("targets", self.targets))
        tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in named}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {path}, the batch of a loss that is not finite: {error}") from error
        return path

    def describe(self) -> str:
        """The step, the process and the terms, in words."""
        terms = ", ".join(f"{name} {self.terms[name]:g}" for name in ("task", "budget"))
        return f"the loss is not finite at step {self.place.step} in process {self.place.position[2]} ({terms})"


class LossWatch:
    """Looks at every forward's loss, on an accelerator one forward late so that the device need not be waited for.

    Args:
        device: where the losses are.
        names: of a forward's scalars, ``loss`` among them.
    """

    def __init__(self, device: torch.device, names: Sequence[str] = LOSS_NAMES) -> None:
        self._device, self._names = device, names
        self._pending: deque[tuple[StepPosition, Tensor, torch.Event | None, Any, Any]] = deque()
        self.bad: BadBatch | None = None

    def watch(self, place: StepPosition, terms: Tensor, images: Any, targets: Any) -> None:
        """Note one forward.

        Args:
            place: where in the run it is.
            terms: float [len(names)], on the device.
            images: of the batch, kept until its loss is known to be finite.
            targets: of the batch, likewise.
        """
        if self._device.type == "cpu":
            self._pending.append((place, terms, None, images, targets))
        else:
            host = _host_tensor(terms)
            host.copy_(terms, non_blocking=True)
            arrived = torch.Event(self._device)
            arrived.record()
            self._pending.append((place, host, arrived, images, targets))

    def look(self, *, wait: bool = False) -> BadBatch | None:
        """The first batch so far whose loss is not finite, or None.

        Args:
            wait: look at the newest forward too, though its loss is still being computed.
        """
        keep = 0 if wait or self._device.type == "cpu" else 1
        while len(self._pending) > keep:
            place, terms, arrived, images, targets = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            values = dict(zip(self._names, terms.tolist(), strict=True))
            if self.bad is None and not math.isfinite(values["loss"]):
                self.bad = BadBatch(place, values, images, targets)
        return self.bad

    def forget(self) -> None:
        """The bad batch has been dealt with."""
        self.bad = None


def _named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested lists and dicts, each by the way to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _named_tensors(f"{name}.{key}", inner)


def _host_tensor(like: Tensor) -> Tensor:
    """Memory of the CPU that a device can copy to in passing."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def tell_first(bad: BadBatch | None, folder: Path, seed: int) -> str | None:
    """Save each process's bad batch, and tell of the earliest. Every process calls it.

    Args:
        bad: of this process, if it has met one.
        folder: the run's folder.
        seed: the run's.

    Returns:
        In words, where it occurred and where it is kept; None where no process has met one.
    """
    own = None
    if bad is not None:
        try:
            kept = f"its batch is in {bad.save(folder, seed)}"
        except UserError as error:
            kept = str(error)
        own = bad.place.step, f"{bad.describe()}; {kept}"
    found = [each for each in gather_object([own]) if each is not None]
    return str(min(found)[1]) if found else None


def gradients_finite(model: nn.Module) -> bool:
    """Whether a network's gradients are finite; waits for the device, and of a sharded network for all processes."""
    norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    return bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
