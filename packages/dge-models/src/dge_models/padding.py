"""Batches in which images of several sizes are padded to one, as detectors make them: which pixels are the images'."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "FollowsPadding",
    "Setting",
    "Sizes",
    "checked_sizes",
    "count_open",
    "ended",
    "followers",
    "padded",
    "settings",
    "sizes_for",
]

Sizes = tuple[tuple[int, int], ...]

in_use = False
"""Whether any thread is inside :func:`padded`. Models look at it first, and compiled code guards on it."""

_lock = threading.Lock()
_open = 0


class FollowsPadding(nn.Module):
    """A model that treats padding as :func:`padded` says; it stands in front of other modules among the bases."""

    def size_multiple(self) -> tuple[int, int]:
        """(H, W) in pixels: an image's size is rounded up to multiples of these, so that nothing reads half of it."""
        raise NotImplementedError

    def canvas_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) in pixels of what the model makes of images of this size, padding of its own included."""
        return size

    def last_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the last blocks' token grid for images of this size."""
        raise NotImplementedError


@dataclass(frozen=True)
class Setting:
    """Whose forward passes follow which sizes.

    Attributes:
        followers: Identities of models.
        sizes: None: not known yet.
        owner: Identity of what will say them, a detector's transform.
        result: What becomes of the detector's output; None: it stays.
    """

    followers: frozenset[int]
    sizes: Sizes | None
    owner: int | None = None
    result: Callable[[Any], Any] | None = None


# Other threads start without: what they run is not what this thread padded.
settings: ContextVar[tuple[Setting, ...]] = ContextVar("dge_models.padding", default=())


def count_open(change: int) -> None:
    """So many more settings are in use."""
    global _open, in_use
    with _lock:
        _open += change
        in_use = _open > 0


def sizes_for(model: nn.Module) -> Sizes | None:
    """The images' own sizes in the innermost :func:`padded` around a model; None outside."""
    for setting in reversed(settings.get()):
        if id(model) in setting.followers and setting.sizes is not None:
            return setting.sizes
    return None


def ended() -> Callable[[], None]:
    """From now on no model follows padding, since what it gets was cut to size; until the result is called."""
    token = settings.set(())
    return lambda: settings.reset(token)


@contextmanager
def padded(model: nn.Module, image_sizes: Sequence[tuple[int, int]] | Tensor) -> Iterator[None]:
    """Treat all but the top left of each image as padding, in forward passes of a model in this thread.

    .. code-block:: python

        with dge_models.padded(backbone, [(250, 333), (192, 320)]):
            maps = backbone(batch)                       # [2, 3, 256, 352]

    What an image gets does not depend on how much it was padded: its outputs, what its regions choose, its MACs. The
    model runs every image at its own size, images of one size together, and lays the results out as for the whole
    batch, with zeros in the padding. So padding costs nothing, it is in no key, no mean and no position embedding
    (which is resampled to each image's own grid), and in no MAC ratio or share of splits: those are means over the
    images' own regions. In the :class:`Routing` of a batch, padded regions have the coarsest split.

    An image's size is rounded up to what the model reads at once: 32 pixels for pyramids (the last stage's stride, and
    what one key of the first stages stands for) and for :class:`SimpleFeaturePyramid`, one patch for other vision
    transformers. So a token is an image's own if any of its pixels is; pixels of it beyond the image are set to zero.
    A token or region at the edge of that is clipped as at the edge of a batch without padding.

    It works in training and evaluation, with gradient checkpointing, and with :func:`collect_routings` and
    :func:`trace`. Forward hooks of blocks see the images of one size at a time. Queries that :func:`set_fixed_queries`
    fixed are for one size, and others are refused. In a compiled model this is a graph break (with ``fullgraph=True``
    an error): what is inside is compiled for the images' sizes. A backward pass needs no context, unless the model as a
    whole is within ``torch.utils.checkpoint``, which then repeats its forward pass.

    Args:
        model: Of this package, dense or with routed blocks, or a module that holds one, such as a detector.
        image_sizes: (height, width) in pixels of each image of the batches to come, integers [B, 2].

    Raises:
        ValueError: The module holds no model that follows padding, or sizes are not as above; in a forward pass, there
            are not as many as images, one is larger than the batch, or the model does not take a size.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("padded: got a compiled caller; expected to be called outside torch.compile")
    setting = Setting(followers(model), checked_sizes(image_sizes))
    token = settings.set((*settings.get(), setting))
    count_open(1)
    try:
        yield
    finally:
        count_open(-1)
        settings.reset(token)


def followers(module: nn.Module) -> frozenset[int]:
    """Identities of the models in a module that follow padding; a ValueError if there is none."""
    found = frozenset(id(part) for part in module.modules() if isinstance(part, FollowsPadding))
    if not found:
        raise ValueError(
            f"model: got {type(module).__name__}; expected a pyramid, a vision transformer or a SimpleFeaturePyramid "
            "of this package, or a module that holds one (a plain vision transformer of timm's follows padding inside "
            "a SimpleFeaturePyramid)"
        )
    return found


def checked_sizes(image_sizes: Any) -> Sizes:
    """(H, W) of each image; a ValueError for what is something else."""
    rows = image_sizes.tolist() if isinstance(image_sizes, Tensor) else list(image_sizes)
    try:
        sizes = tuple((int(height), int(width)) for height, width in rows)
    except (TypeError, ValueError):
        raise ValueError(f"image_sizes: got {image_sizes!r}; expected (height, width) of each image") from None
    if any(min(size) < 1 for size in sizes):
        raise ValueError(f"image_sizes: got {sizes}; expected at least 1 × 1 pixel each")
    return sizes
