"""``collect_routings``: the routings of a model that is part of something else, such as a detector's backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dge_models.finding import find_routed, routed_models
from dge_models.listening import heard_by
from dge_models.routed import RoutedModel, routed_blocks
from dge_models.routing import Routing

__all__ = ["CollectedRoutings", "RoutingRecord", "collect_routings"]


class RoutingRecord:
    """What one model routed.

    Attributes:
        name: Of the model in the module that was watched, "" if it is the module itself.
        model: The model; with :attr:`routings` what a budget term takes.
        forwards: One list of routings per forward pass, each in network order.
    """

    def __init__(self, name: str, model: RoutedModel) -> None:
        self.name = name
        self.model = model
        self.forwards: list[list[Routing]] = []
        self._order = {id(block): index for index, block in enumerate(routed_blocks(model))}
        self._next = 0

    @property
    def routings(self) -> list[Routing]:
        """One per routed block, in network order; several forward passes are one batch, the images of all of them.

        Raises:
            ValueError: There was no forward pass, or they had different token grids.
        """
        if not self.forwards:
            raise ValueError(
                f"routings: got none, {type(self.model).__name__} was not run; expected a forward pass inside "
                "collect_routings, in the same thread"
            )
        if len({len(forward) for forward in self.forwards}) > 1:
            lengths = [len(forward) for forward in self.forwards]
            raise ValueError(f"routings: got forward passes of {lengths} routed blocks; expected all of them in each")
        return [_joined(layer) for layer in zip(*self.forwards, strict=True)]

    def listens_to(self, block: nn.Module) -> bool:
        """Whether a block is one of the model's."""
        return id(block) in self._order

    def add(self, block: nn.Module, routing: Routing) -> None:
        """Take a routing; a block that comes no later than the last one begins another forward pass."""
        index = self._order[id(block)]
        if index < self._next or not self.forwards:
            self.forwards.append([])
        self.forwards[-1].append(routing)
        self._next = index + 1


class CollectedRoutings:
    """What :func:`collect_routings` collects.

    Attributes:
        records: One per model with routed blocks in the module, in the order of ``module.modules()``.
    """

    def __init__(self, records: list[RoutingRecord]) -> None:
        self.records = records

    @property
    def model(self) -> RoutedModel:
        """The model, where there is one; a ValueError where there are several."""
        return self._only().model

    @property
    def routings(self) -> list[Routing]:
        """The model's :attr:`RoutingRecord.routings`, where there is one; a ValueError where there are several."""
        return self._only().routings

    def _only(self) -> RoutingRecord:
        if len(self.records) != 1:
            names = ", ".join(record.name or "itself" for record in self.records)
            raise ValueError(
                f"collected: the module has {len(self.records)} models with routed blocks ({names}); expected one, "
                "read .records"
            )
        return self.records[0]


@contextmanager
def collect_routings(module: nn.Module) -> Iterator[CollectedRoutings]:
    """Collect what the models with routed blocks route that a module holds, whatever calls them inside.

    .. code-block:: python

        with dge_models.collect_routings(detector) as collected:
            losses = detector(images, targets)
        loss = sum(losses.values()) + budget(collected.model, collected.routings)

    The routings carry the gradient from the budget to the routers, as those of ``forward_routed`` do. Nothing is left
    on the modules. Forward passes that gradient checkpointing repeats in the backward pass are not counted again.
    Contexts nest, and each sees the forward passes inside it. What other threads run is not collected, such as the
    replicas of ``torch.nn.DataParallel``. In a compiled model the graph breaks after the blocks while somebody
    listens; with ``fullgraph=True`` that is an error. (Re-entrant checkpointing around a whole model cuts its routings
    off from the graph; ``use_reentrant=False`` does not.)

    Args:
        module: Is or holds models of this package: DDP, a detector, timm's ``FeatureGetterNet``.

    Yields:
        What is collected.

    Raises:
        ValueError: The module has no model with routed blocks.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("collect_routings: got a compiled caller; expected to be called outside torch.compile")
    models = routed_models(module)
    if not models:
        find_routed(module)
    collected = CollectedRoutings([RoutingRecord(name, model) for name, model in models.items()])
    with heard_by(*collected.records):
        yield collected


def _joined(parts: Sequence[Routing]) -> Routing:
    """The routings of one layer in several forward passes, as of one batch."""
    first = parts[0]
    if len(parts) == 1:
        return first
    grids = [part.grid for part in parts]
    if len(set(grids)) > 1:
        raise ValueError(f"routings: got forward passes with token grids of {grids}; expected one grid, read .forwards")
    logits = [part.logits for part in parts if part.logits is not None]
    real = [part.real_grids or (part.grid,) * part.choice.shape[0] for part in parts]
    return Routing(
        choice=torch.cat([part.choice for part in parts]),
        gate=torch.cat([part.gate for part in parts]),
        queries=torch.cat([part.queries for part in parts]),
        grid=first.grid,
        num_prefix_tokens=first.num_prefix_tokens,
        splits=first.splits,
        logits=torch.cat(logits) if len(logits) == len(parts) else None,
        real_grids=None if all(part.real_grids is None for part in parts) else sum(real, ()),
    )
