"""Run images of a padded batch at their own sizes, and lay the results out as of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dge_models.encoder import DGEBlock
from dge_models.families import family_of
from dge_models.graph_breaks import outside_graphs
from dge_models.listening import listeners
from dge_models.padding import FollowsPadding, ended, padded, sizes_for
from dge_models.routing import Routing, region_grid

__all__ = ["StageTokens", "at_own_sizes", "forward_padded"]

Size = tuple[int, int]

_REASON = "images of several sizes are run one size after the other, see dge_models.padded"


class StageTokens(NamedTuple):
    """Tokens [B, T + H·W, C] of a grid (H, W), with T prefix tokens in front."""

    tokens: Tensor
    grid: Size
    prefix: int


class _Group(NamedTuple):
    """Images of one size: their places in the batch, (H, W) in pixels, themselves [b, C, H, W], and their noise."""

    places: list[int]
    size: Size
    images: Tensor
    noise: list[Tensor] | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of a forward pass."""
        return (self.images,) if self.noise is None else (self.images, self.noise)


# Compiled code breaks off here; what `run` calls is compiled for the images' sizes.
@outside_graphs(_REASON, recursive=False)
def at_own_sizes(
    model: FollowsPadding, run: Callable[..., Any], images: Tensor, noise: Sequence[Tensor] | None = None
) -> Any:
    """Call a function once per size of image, inside :func:`dge_models.padded`; outside it, once.

    Args:
        model: Whose forward pass it is.
        run: Takes images [b, C, H, W], and noise if it is given. It returns tensors [b, …], tokens [b, N, C] of the
            last grid, maps [b, C, h, w], :class:`StageTokens`, :class:`Routing`, and lists, tuples and dicts of them.
        images: [B, C, H, W].
        noise: One tensor per routed block, float32 [B, ⌈H/S⌉, ⌈W/S⌉, n] for the grid of the whole batch, its size
            rounded up to what the model reads at once; the images take what is theirs.

    Returns:
        What `run` returns, for the whole batch; zero in the padding.

    Raises:
        ValueError: There are not as many sizes as images, or one is larger than the batch.
    """
    batch = _cut(model, images, noise)
    if batch is None:
        return run(images) if noise is None else run(images, noise)
    results = []
    for group in batch.groups:
        batch.begin()
        try:
            results.append(run(*group.arguments))
        finally:
            batch.end()
    return batch.result(results)


def forward_padded(model: nn.Module, images: Tensor, image_sizes: Sequence[Size] | Tensor) -> Any:
    """Run a module around a model of this package, such as a segmenter, on a padded batch: every image at its own size.

    .. code-block:: python

        segmenter = smp.FPN("tu-pvt_dge_s124_tiny_256", encoder_weights=None, classes=150)
        logits = dge_models.forward_padded(segmenter, batch, [(250, 333), (192, 320)])

    Inside :func:`padded` the model alone follows padding, and layers around it see zeros there, into which biases and
    upsampling reach. Here all of the module runs at each image's size, rounded up to what the model reads at once (32
    pixels for pyramids), images of one size together. So no part of an image's output depends on how much it was
    padded. In training, batch norms see one size at a time.

    Args:
        model: Holds one model that follows padding; takes images and returns maps [b, C, h, w], or what
            :func:`padded` lays out.
        images: [B, C, H, W].
        image_sizes: As in :func:`padded`.

    Returns:
        What the module returns, for the whole batch; zero in the padding beyond the rounded sizes.

    Raises:
        ValueError: As in :func:`padded`.
    """
    with padded(model, image_sizes):
        follower = next(part for part in model.modules() if isinstance(part, FollowsPadding))
        return at_own_sizes(follower, model, images)


@outside_graphs(_REASON)
def _cut(model: FollowsPadding, images: Tensor, noise: Sequence[Tensor] | None) -> _Batch | None:
    """The images at their own sizes; None if nobody says that they are padded."""
    sizes = sizes_for(model)
    if sizes is None or images.ndim != 4:
        return None
    groups = _groups(images, sizes, model.size_multiple())
    if noise is not None:
        groups = [group._replace(noise=_own_noise(model, noise, group)) for group in groups]
    return _Batch(groups, _Layout(model, groups, (images.shape[2], images.shape[3])))


class _Batch:
    """One forward pass at several sizes: what each of them routes is told as of one batch."""

    def __init__(self, groups: list[_Group], layout: _Layout) -> None:
        self.groups, self.layout = groups, layout
        self.outer = listeners.get()
        self.recorders: list[_Recorder] = []
        self._left: Any = None

    @outside_graphs(_REASON)
    def begin(self) -> None:
        """Before one size: the model inside gets images without padding, and only this listens."""
        self.recorders.append(_Recorder(self.outer))
        self._left = (ended(), listeners.set((self.recorders[-1],) if self.outer else ()))

    @outside_graphs(_REASON)
    def end(self) -> None:
        """After one size."""
        padding, listening = self._left
        listeners.reset(listening)
        padding()

    @outside_graphs(_REASON)
    def result(self, results: list[Any]) -> Any:
        """Tell the routings, and join the results."""
        for parts in zip(*(recorder.routings for recorder in self.recorders), strict=True):
            block, routing = parts[0][0], self.layout.routing([part for _, part in parts])
            for listener in self.outer:
                if listener.listens_to(block):
                    listener.add(block, routing)
        return self.layout.join(results)


class _Recorder:
    """Keeps what the images of one size route, for those who want to know of the whole batch."""

    def __init__(self, outer: Sequence[Any]) -> None:
        self.outer = outer
        self.routings: list[tuple[nn.Module, Routing]] = []

    def listens_to(self, block: nn.Module) -> bool:
        return any(listener.listens_to(block) for listener in self.outer)

    def add(self, block: nn.Module, routing: Routing) -> None:
        self.routings.append((block, routing))


def _up(size: Size, multiple: Size) -> Size:
    """A size rounded up to multiples."""
    return -(-size[0] // multiple[0]) * multiple[0], -(-size[1] // multiple[1]) * multiple[1]


def _groups(images: Tensor, sizes: Sequence[Size], multiple: Size) -> list[_Group]:
    """The images by their sizes, rounded up, in the order in which sizes come."""
    height, width = images.shape[2:]
    if len(sizes) != images.shape[0]:
        raise ValueError(f"image_sizes: got {len(sizes)} sizes; expected one per image of the batch, {images.shape[0]}")
    places: dict[Size, list[int]] = {}
    for place, size in enumerate(sizes):
        if size[0] > height or size[1] > width:
            raise ValueError(f"image_sizes: got {size}; expected at most the batch's {height} × {width} pixels")
        places.setdefault(_up(size, multiple), []).append(place)
    if len(places) == 1 and all(size == (height, width) for size in (*sizes, *places)):
        return [_Group(list(range(len(sizes))), (height, width), images)]
    return [
        _Group(own, size, torch.stack([_own_pixels(images[place], sizes[place], size) for place in own]))
        for size, own in places.items()
    ]


def _own_pixels(image: Tensor, size: Size, rounded: Size) -> Tensor:
    """[C, H, W] at its own size, with zeros up to the rounded one."""
    return F.pad(image[:, : size[0], : size[1]], (0, rounded[1] - size[1], 0, rounded[0] - size[0]))


def _own_noise(model: FollowsPadding, noise: Sequence[Tensor], group: _Group) -> list[Tensor]:
    """What is a group's of the noise for the whole batch."""
    blocks = [block for block in model.modules() if isinstance(block, DGEBlock)]
    grids = [grid for grid, _ in family_of(model).routed_places(model, group.size)]
    if len(noise) != len(blocks):  # which the model refuses
        return list(noise)
    shapes = [region_grid(grid, block.router.splits) for grid, block in zip(grids, blocks, strict=True)]
    return [part[group.places, :rows, :cols] for part, (rows, cols) in zip(noise, shapes, strict=True)]


@dataclass(frozen=True)
class _Layout:
    """Where the results of groups of images are in those of the whole batch.

    Attributes:
        model: Whose they are.
        groups: The images.
        batch: (H, W) of the whole batch in pixels.
    """

    model: FollowsPadding
    groups: list[_Group]
    batch: Size

    def join(self, parts: list[Any]) -> Any:
        """The result of the whole batch from those of the groups."""
        first = parts[0]
        if isinstance(first, Tensor):
            return self._tensor(parts)
        if isinstance(first, Routing):
            return self.routing(parts)
        if isinstance(first, StageTokens):
            grids = [part.grid for part in parts]
            tokens = self._tokens([part.tokens for part in parts], grids, first.prefix)
            return StageTokens(tokens, self._scaled(first.grid, self.canvas), first.prefix)
        if hasattr(first, "join_images"):
            return type(first).join_images(parts, self.rows)
        if isinstance(first, dict):
            return type(first)((key, self.join([part[key] for part in parts])) for key in first)
        if isinstance(first, list | tuple):
            return type(first)(self.join(list(each)) for each in zip(*parts, strict=True))
        return first

    @property
    def canvas(self) -> Size:
        """(H, W) in pixels of what the model would have made of the whole batch."""
        return self.model.canvas_size(self.batch)

    def rows(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """One entry per image, in the order of the batch."""
        joined = torch.cat(list(parts), dim)
        order = [place for group in self.groups for place in group.places]
        if order == sorted(order):
            return joined
        back = sorted(range(len(order)), key=order.__getitem__)
        return joined.index_select(dim, torch.tensor(back, device=joined.device))

    def routing(self, parts: Sequence[Routing]) -> Routing:
        """One layer's routing; where an image has no regions, that of the coarsest split."""
        first, splits = parts[0], parts[0].splits
        grid = self._scaled(first.grid, _up(self.batch, self.model.size_multiple()))
        shape, coarsest = region_grid(grid, splits), len(splits) - 1
        filler = F.one_hot(torch.tensor(coarsest, device=first.gate.device), len(splits)).to(first.gate.dtype)

        def whole(values: Tensor) -> Tensor:
            outside = values.new_ones(values.shape[:3])
            return _fitted(values, shape) + _fitted(outside - 1, shape, value=1).unsqueeze(-1) * filler

        own = {place: part.grid for group, part in zip(self.groups, parts, strict=True) for place in group.places}
        logits = [part.logits for part in parts if part.logits is not None]
        return replace(
            first,
            choice=self.rows([_fitted(part.choice, shape, value=coarsest) for part in parts]),
            gate=self.rows([whole(part.gate) for part in parts]),
            queries=self.rows([part.queries for part in parts]),
            grid=grid,
            logits=self.rows([whole(part) for part in logits]) if len(logits) == len(parts) else None,
            real_grids=tuple(own[place] for place in sorted(own)),
        )

    def _scaled(self, length: Size, size: Size) -> Size:
        """What is so long at the first group's size, at another one: both are made of the same strides."""
        own = self.groups[0].size
        return max(1, size[0] * length[0] // own[0]), max(1, size[1] * length[1] // own[1])

    def _tensor(self, parts: list[Tensor]) -> Tensor:
        if parts[0].ndim == 4:
            height, width = self._scaled((parts[0].shape[2], parts[0].shape[3]), self.canvas)
            return self.rows([F.pad(part, (0, width - part.shape[3], 0, height - part.shape[2])) for part in parts])
        if parts[0].ndim == 3:
            grids = [self.model.last_grid(group.size) for group in self.groups]
            return self._tokens(parts, grids, parts[0].shape[1] - grids[0][0] * grids[0][1])
        return self.rows(parts)

    def _tokens(self, parts: Sequence[Tensor], grids: Sequence[Size], prefix: int) -> Tensor:
        shape = self._scaled(grids[0], self.canvas)
        spatial = [torch.unflatten(part[:, prefix:], 1, grid) for part, grid in zip(parts, grids, strict=True)]
        whole = [_fitted(part, shape).flatten(1, 2) for part in spatial]
        return self.rows([torch.cat([part[:, :prefix], own], 1) for part, own in zip(parts, whole, strict=True)])


def _fitted(values: Tensor, shape: Size, value: float = 0) -> Tensor:
    """[b, h, w] or [b, h, w, c] with other sides, cut or filled at the right and bottom."""
    down, across = shape[0] - values.shape[1], shape[1] - values.shape[2]
    channels = (0, 0) if values.ndim == 4 else ()
    return F.pad(values, (*channels, 0, across, 0, down), value=value)
