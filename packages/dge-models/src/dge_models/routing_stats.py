"""A model's routing over a whole data set, and what any shift of the router logits would cost."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dge_models.budget import cheapest_ratio, mac_ratio, routed_macs
from dge_models.evaluating import evaluating
from dge_models.projections import placement
from dge_models.routed import routed_blocks
from dge_models.router import split_costs
from dge_models.routing import Routing, count_queries

__all__ = ["LayerLogits", "Observation", "observe", "pixels_of", "refuse_fixed", "refuse_iterator"]


@dataclass(frozen=True)
class LayerLogits:
    """Router logits of one routed block for a number of images.

    Attributes:
        logits: float32 [B, Hr, Wr, n].
        cost: float32 [Hr, Wr, n], the share of the model's MACs that each split of each region takes.
        price: float32 [n], see :func:`split_costs`.
    """

    logits: Tensor
    cost: Tensor
    price: Tensor

    def spent(self, shift: float) -> float:
        """Shares of the model's MACs that the shifted logits choose, summed over regions and images."""
        choice = (self.logits + shift * self.price).argmax(-1, keepdim=True)
        return self.cost.expand_as(self.logits).gather(-1, choice).sum(dtype=torch.float64).item()

    def spread(self) -> float:
        """A shift of this size up or down makes every region finest or coarsest."""
        steps = self.price[:-1] - self.price[1:]
        widest = (self.logits.amax(-1) - self.logits.amin(-1)).max().item()
        return widest / steps.min().item() + 1e-3 if len(steps) else 0.0


@dataclass(frozen=True)
class Observation:
    """One pass over a data set, in evaluation.

    Attributes:
        images: How many there were.
        ratio: Mean MAC ratio.
        cheapest: The smallest mean MAC ratio that routing could reach on them.
        choices: Per routed block, int64 [n]: the regions that got each split, over all images.
        layers: The logits, one entry per routed block and batch.
    """

    images: int
    ratio: float
    cheapest: float
    choices: list[Tensor]
    layers: list[LayerLogits]

    def predict(self, change: float) -> float:
        """The mean MAC ratio if every logit were shifted by `change` and the tokens stayed what they are.

        Exact for the first routed block; the later ones would see other tokens.
        """
        moved = sum(layer.spent(change) - layer.spent(0.0) for layer in self.layers)
        return self.ratio + moved / self.images

    def spread(self) -> float:
        """A shift of this size up or down makes every region of these logits finest or coarsest."""
        return max(layer.spread() for layer in self.layers)


def refuse_fixed(model: nn.Module) -> None:
    """A ValueError if a model's queries are fixed."""
    if any(block.fixed_layout is not None for block in routed_blocks(model)):
        raise ValueError("model: its queries are fixed; expected dynamic ones, call set_dynamic_queries first")


def refuse_iterator(loader: Iterable[Any], name: str = "loader") -> None:
    """A TypeError if a loader, the argument of that name, can be read only once."""
    if iter(loader) is loader:
        raise TypeError(
            f"{name}: got an iterator ({type(loader).__name__}); expected what can be read several times, "
            "such as a DataLoader or a list of batches"
        )


def observe(model: Any, loader: Iterable[Any], lowest: float = 1.0) -> Observation:
    """Route a data set in evaluation, once, without gradients.

    Args:
        model: With routed blocks; its modes are restored.
        loader: Batches of images [B, C, H, W], or sequences whose first element is one; moved to the model's
            device.
        lowest: Stop with an error as soon as this MAC ratio proves to be below the cheapest routing.

    Raises:
        TypeError: A batch is of another kind.
        ValueError: No images, `lowest` can't be reached, or logits that are not finite.
    """
    device = placement(model)[0]
    images, ratio, cheapest = 0, 0.0, 0.0
    choices: list[Tensor] = []
    layers: list[LayerLogits] = []
    with evaluating(model), torch.no_grad():
        for batch in loader:
            pixels = pixels_of(batch).to(device)
            if not len(pixels):
                continue
            with _recorded_logits(model) as logits:
                routings = model.forward_routed(pixels)[1]
            images += len(pixels)
            ratio += mac_ratio(model, routings).item() * len(pixels)
            cheapest += cheapest_ratio(model, routings) * len(pixels)
            _check_reachable(lowest, cheapest / images)
            counts = [routing.choice.flatten().bincount(minlength=len(routing.splits)).cpu() for routing in routings]
            choices = [a + b for a, b in zip(choices, counts, strict=True)] if choices else counts
            layers += _with_costs(model, routings, logits)
    if not images:
        raise ValueError("loader: got no images; expected at least one batch of them")
    return Observation(images, ratio / images, cheapest / images, choices, layers)


def _check_reachable(wanted: float, cheapest: float) -> None:
    if wanted < cheapest - 1e-6:
        raise ValueError(
            f"ratio: got {wanted}; expected at least {cheapest:.4f}, the MAC ratio of the cheapest routing "
            "(every region at its coarsest split)"
        )


def pixels_of(batch: Any) -> Tensor:
    """The images of a batch: [B, C, H, W], the batch itself or its first element; a TypeError for other batches."""
    images = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
    if not isinstance(images, Tensor):
        raise TypeError(
            f"loader: got a batch of type {type(batch).__name__}; expected an image tensor [B, C, H, W], "
            "or a sequence that starts with one, such as (images, labels)"
        )
    return images


@contextmanager
def _recorded_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the logits of every routed block's call are appended to the list, in order of execution."""
    recorded: list[Tensor] = []

    def record(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = inspect.signature(block.forward).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        recorded.append(block.router.logits(given["x"], given["grid"], given["num_prefix_tokens"]).float())

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in routed_blocks(model)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _with_costs(model: nn.Module, routings: Sequence[Routing], recorded: Sequence[Tensor]) -> list[LayerLogits]:
    macs, layers = routed_macs(model, routings)
    result = []
    for routing, layer, logits in zip(routings, layers, recorded, strict=True):
        if not logits.isfinite().all():
            raise ValueError("model: its router logits are not finite; expected trained weights and finite images")
        cost = count_queries(routing.grid, routing.splits, logits.device) * (layer.per_query / macs.static)
        result.append(LayerLogits(logits, cost, split_costs(routing.splits).to(logits.device)))
    return result
