"""A cheaper copy of a pretrained vision transformer, by merging similar tokens; nothing is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dge_models.attention import refuse_unsupported
from dge_models.budget import check_target
from dge_models.evaluating import evaluating
from dge_models.merged import (
    MergedTransformer,
    MergedVisionTransformer,
    MergedVisionTransformerDistilled,
    Merging,
    MergingBlock,
)
from dge_models.merging import Groups, Match, single_tokens
from dge_models.projections import copied, placement
from dge_models.recorded_arguments import record_base
from dge_models.routing_stats import pixels_of
from dge_models.unconvertible import reason_against_parts

__all__ = ["MergeSetting", "merge_tokens", "merging_like", "set_merge_counts", "set_merge_ratio"]

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: MergedVisionTransformer,
    VisionTransformerDistilled: MergedVisionTransformerDistilled,
}
_MAX_PASSES = 12
# So many times the mean merge in one image at most. Without it uniform images, whose tokens are all alike, lose nearly
# all of them, and most of the error is theirs.
_LIMIT = 2.0


@dataclass(frozen=True)
class MergeSetting:
    """What a merging model was set to.

    Attributes:
        target: The MAC ratio that was asked for.
        ratio: The mean MAC ratio reached on the loader's images; with constant counts that of every image.
        thresholds: Per block, the cosine above which groups merge; None where the counts are constant.
        counts: Per block, how many groups of each image merge; None where thresholds decide.
        images: Images per pass.
        passes: Passes over the images.
    """

    target: float
    ratio: float
    thresholds: tuple[float, ...] | None
    counts: tuple[int, ...] | None
    images: int
    passes: int


def merge_tokens(
    model: nn.Module,
    ratio: float,
    loader: Iterable[Any] | None = None,
    adaptive: bool = True,
    *,
    tolerance: float = 0.02,
) -> MergedTransformer:
    """Give a timm vision transformer blocks that merge similar tokens, so that it spends a share of its MACs.

    The result is a copy with the same weights under the same names, and needs no training. In each block, between
    attention and MLP, the tokens at even places look for the most similar one at an odd place, by the mean of their
    keys over the heads; pairs that are similar enough become one token, their mean weighted by size. Attention counts a
    merged token as often as it has members. At the end every token of the grid is there again: what it was when it was
    merged, plus what its group has changed since.

    Args:
        model: timm's ``VisionTransformer`` or ``VisionTransformerDistilled``, plain. It is left as it is.
        ratio: Mean MAC ratio to reach, up to 1.
        loader: Batches of images [B, C, H, W], or sequences that start with one: some dozens to some hundreds of the
            kind that the model will see, all of one size. They are kept in memory while thresholds are found. Not
            needed for constant counts.
        adaptive: Merge above a threshold per layer, which is found on the images: each image keeps as many tokens as it
            needs. Else the same number merges in every image: static shapes, for export.
        tolerance: Largest difference to `ratio` to accept.

    Returns:
        The copy, in the training or evaluation mode of `model`.

    Raises:
        TypeError: The loader yields something else than images.
        ValueError: The model is of another class or has parts that cannot merge, `ratio` is out of reach (the error
            says what is in reach), or there are no images.
    """
    check_target("ratio", ratio)
    merged = _converted(model)
    set_merge_ratio(merged, ratio, loader, adaptive, tolerance=tolerance)
    return merged


def _converted(model: nn.Module) -> MergedTransformer:
    """A copy in which nothing merges yet."""
    _refuse(model)
    merged: Any = copied(model)
    for index, block in enumerate(merged.blocks):
        refuse_unsupported(block.attn, f"blocks.{index}.attn")
        block.__class__ = MergingBlock
        block.threshold, block.limit, block.count = None, None, 0
    merged.__class__ = _CLASSES[type(model)]
    record_base(merged)
    return cast(MergedTransformer, merged)


def merging_like(
    model: nn.Module,
    thresholds: Sequence[float] | None = None,
    limits: Sequence[int] | None = None,
    counts: Sequence[int] | None = None,
) -> MergedTransformer:
    """What :func:`merge_tokens` gives, with settings that were found before.

    Args:
        model: As in :func:`merge_tokens`.
        thresholds: Per block, as :class:`MergingBlock` has them.
        limits: Beside thresholds, as well.
        counts: Instead of both, as in :func:`set_merge_counts`.

    Raises:
        ValueError: As in :func:`merge_tokens`, or the settings are not one per block or of both kinds.
    """
    merged: Any = _converted(model)
    if counts is not None:
        if thresholds is not None or limits is not None:
            raise ValueError("merge_counts: got counts beside thresholds or limits; expected one kind of setting")
        set_merge_counts(merged, counts)
        return cast(MergedTransformer, merged)
    depth = len(merged.blocks)
    for name, values in (("merge_thresholds", thresholds), ("merge_limits", limits)):
        if values is None or len(values) != depth:
            got = "none" if values is None else str(len(values))
            raise ValueError(f"{name}: got {got}; expected one per block, {depth}")
    for block, threshold, limit in zip(merged.blocks, thresholds or (), limits or (), strict=True):
        block.threshold, block.limit, block.count = float(threshold), int(limit), None
    return cast(MergedTransformer, merged)


def _refuse(model: Any) -> None:
    if isinstance(model, MergedTransformer):
        raise ValueError(
            f"model: {type(model).__name__} merges already; expected a plain timm model (set_budget turns it)"
        )
    if type(model) not in _CLASSES:
        expected = " or ".join(kind.__name__ for kind in _CLASSES)
        raise ValueError(
            f"model: got {type(model).__name__}; expected timm's {expected}, plain (a merged token has no place of its "
            "own, as rotary embeddings, windows and routed regions need)"
        )
    reason = reason_against_parts(model)
    if reason is not None:
        raise ValueError(f"model: {reason}")
    if not isinstance(model.patch_drop, nn.Identity | None):
        raise ValueError("patch_drop_rate: got patch dropout; expected 0, the whole grid is restored at the end")
    for index, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise ValueError(f"blocks.{index}: got {type(block).__name__}; expected timm's plain pre-norm Block")


def set_merge_ratio(
    model: nn.Module,
    ratio: float,
    loader: Iterable[Any] | None = None,
    adaptive: bool = True,
    *,
    tolerance: float = 0.02,
) -> MergeSetting:
    """Set another budget of a model from :func:`merge_tokens`, in place; see there for the arguments and errors."""
    check_target("ratio", ratio)
    if not tolerance > 0:
        raise ValueError(f"tolerance: got {tolerance}; expected a positive number")
    if not isinstance(model, MergedTransformer):
        raise ValueError(f"model: got {type(model).__name__}; expected a model from merge_tokens")
    merged: Any = model
    before = [(block.threshold, block.limit, block.count) for block in merged.blocks]
    try:
        if adaptive:
            return _set_thresholds(merged, ratio, loader, tolerance)
        return _set_counts(merged, ratio, tolerance)
    except BaseException:
        for block, settings in zip(merged.blocks, before, strict=True):
            block.threshold, block.limit, block.count = settings
        raise


def set_merge_counts(model: nn.Module, counts: Sequence[int]) -> None:
    """Merge a constant number of groups per block, such as the published method's: the same in every layer.

    Args:
        model: From :func:`merge_tokens`; changed in place.
        counts: Groups of each image that merge, one number per block.

    Raises:
        ValueError: The model doesn't merge, the numbers are not one per block, or a block has fewer to merge.
    """
    if not isinstance(model, MergedTransformer):
        raise ValueError(f"model: got {type(model).__name__}; expected a model from merge_tokens")
    merged: Any = model
    left, wanted = _grid_tokens(merged), [int(count) for count in counts]
    if len(wanted) != len(merged.blocks):
        raise ValueError(f"counts: got {len(wanted)}; expected one per block, {len(merged.blocks)}")
    for index, count in enumerate(wanted):
        if not 0 <= count <= left // 2:
            raise ValueError(
                f"counts: got {count} for block {index}; expected 0 to {left // 2}, half of the {left} left"
            )
        left -= count
    for block, count in zip(merged.blocks, wanted, strict=True):
        block.threshold, block.limit, block.count = None, None, count


def _grid_tokens(model: Any) -> int:
    rows, cols = model.patch_embed.grid_size
    return int(rows * cols)


class _Schedule:
    """How many groups merge in each layer on average: on a line from the first layer to twice that in the last.

    Merging early saves more, and harms more. On DINOv2 ViT-S/14 the harm of merging 16 of 256 tokens in one layer alone
    falls to an eighth from the first layer to the eighth, and it grows with the 2.5th power of their number. Equal harm
    per saved MAC then asks for about twice as many in deep layers.
    """

    def __init__(self, model: Any) -> None:
        depth = len(model.blocks)
        line = [1 + layer / max(depth - 1, 1) for layer in range(depth)]
        self.shares = [height / sum(line) for height in line]
        self.tokens = _grid_tokens(model)
        # Then the first layer merges all that it can, and all others have long since done so.
        self.most = self.tokens / self.shares[0]

    def means(self, total: float) -> list[float]:
        """Groups that merge per layer if `total` do in all of them; at most half of what is left."""
        left, means = float(self.tokens), []
        for share in self.shares:
            means.append(min(total * share, left / 2))
            left -= means[-1]
        return means

    def counts(self, total: float) -> list[int]:
        """The same in whole numbers."""
        counts: list[int] = []
        left, due = self.tokens, 0.0
        for mean in self.means(total):
            due += mean
            counts.append(min(int(due - sum(counts)), left // 2))
            left -= counts[-1]
        return counts


def _ratio_of_counts(model: Any, counts: Sequence[float]) -> float:
    """The MAC ratio of an image that loses these numbers of groups."""
    tokens = torch.tensor([float(_grid_tokens(model) + model.num_prefix_tokens)], dtype=torch.float64)
    mergings = []
    for count in counts:
        mergings.append(Merging(tokens, tokens - count, None))
        tokens = tokens - count
    macs = model.macs_of(mergings, model.patch_embed.grid_size)
    return float(macs.total / macs.static_total)


def _set_counts(model: Any, ratio: float, tolerance: float) -> MergeSetting:
    schedule = _Schedule(model)
    for block in model.blocks:
        block.threshold, block.count = None, 1  # the similarities are to be counted
    # Ratio 1 is without any merging, and so without its similarities.
    best, reached = [0] * len(model.blocks), 1.0
    cheapest = 1.0
    for total in range(1, int(schedule.most) + 1):
        counts = schedule.counts(total)
        current = _ratio_of_counts(model, counts)
        cheapest = min(cheapest, current)
        if abs(current - ratio) < abs(reached - ratio):
            best, reached = counts, current
    if abs(reached - ratio) > tolerance:
        raise ValueError(f"ratio: got {ratio}; expected one from {cheapest:.3f}, as much merged as can be, to 1")
    set_merge_counts(model, best)
    return MergeSetting(ratio, _ratio_of_counts(model, best), None, tuple(best), 0, 0)


@dataclass
class _Batch:
    """Calibration images on their way through the blocks."""

    x: Tensor
    groups: Groups
    found: Match | None
    mergings: list[Merging]


def _set_thresholds(model: Any, ratio: float, loader: Iterable[Any] | None, tolerance: float) -> MergeSetting:
    if loader is None:
        raise ValueError("loader: got None; expected images to find the thresholds on (adaptive=False needs none)")
    schedule = _Schedule(model)
    if ratio == 1:
        set_merge_counts(model, [0] * len(model.blocks))
        return MergeSetting(1.0, 1.0, None, (0,) * len(model.blocks), 0, 0)
    for block in model.blocks:
        block.threshold, block.count = 1.0, None  # the similarities are to be counted
    with evaluating(model), torch.no_grad():
        embedded, grid = _embedded(model, loader)
        low, high = 0.0, schedule.most  # groups merged in all: ratio 1, and the cheapest
        total, best, passes = _first_guess(model, schedule, ratio), None, 0
        cheapest = 1.0
        while passes < _MAX_PASSES:
            settings, reached = _pass(model, schedule.means(total), embedded, grid)
            passes += 1
            cheapest = min(cheapest, reached)
            if best is None or abs(reached - ratio) < abs(best[1] - ratio):
                best = (settings, reached)
            if abs(best[1] - ratio) <= tolerance / 10 or high - low < 0.25:
                break
            low, high = (total, high) if reached > ratio else (low, total)
            # The ratio falls nearly in proportion to what is merged.
            guess = total * (1 - ratio) / max(1 - reached, 1e-6)
            total = guess if low < guess < high else (low + high) / 2
    images = sum(len(x) for x in embedded)
    if best is None or abs(best[1] - ratio) > tolerance:
        raise ValueError(f"ratio: got {ratio}; expected one from {cheapest:.3f}, as much merged as can be, to 1")
    for block, (threshold, limit) in zip(model.blocks, best[0], strict=True):
        block.threshold, block.limit, block.count = threshold, limit, None
    return MergeSetting(ratio, best[1], tuple(threshold for threshold, _ in best[0]), None, images, passes)


def _first_guess(model: Any, schedule: _Schedule, ratio: float) -> float:
    low, high = 0.0, schedule.most
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if _ratio_of_counts(model, schedule.means(middle)) > ratio else (low, middle)
    return high


def _embedded(model: Any, loader: Iterable[Any]) -> tuple[list[Tensor], tuple[int, int]]:
    """Tokens [B, N, C] in front of the blocks, one tensor per batch, and the grid of all of them."""
    tokens, grids = [], set()
    device = placement(model)[0]
    for batch in loader:
        pixels = pixels_of(batch).to(device)
        if not len(pixels):
            continue
        x, grid, _ = model._embed(pixels)
        tokens.append(x)
        grids.add(tuple(grid))
    if not tokens:
        raise ValueError("loader: got no images; expected at least one batch")
    if len(grids) > 1:
        raise ValueError(f"loader: got images of several sizes, with grids {sorted(grids)}; expected one")
    return tokens, grids.pop()


def _pass(
    model: Any, means: Sequence[float], embedded: Sequence[Tensor], grid: tuple[int, int]
) -> tuple[list[tuple[float, int]], float]:
    """Thresholds and limits under which so many groups merge in each layer on average, and the mean MAC ratio then."""
    batches = [
        _Batch(x.flatten(0, 1), single_tokens(x, model.num_prefix_tokens, even=False), None, []) for x in embedded
    ]
    images = sum(len(x) for x in embedded)
    settings = []
    for block, mean in zip(model.blocks, means, strict=True):
        block.limit = max(1, round(_LIMIT * mean))
        for batch in batches:
            batch.x, batch.found = block.attend_groups(batch.x, batch.groups)
        threshold = _quantile([batch.found for batch in batches], round(mean * images))
        settings.append((threshold, block.limit))
        block.threshold, block.count = threshold, None
        for batch in batches:
            selected = None if batch.found is None else batch.found.similarity > threshold
            batch.x, batch.groups, merging = block.merge_groups(batch.x, batch.groups, batch.found, selected)
            batch.mergings.append(Merging(merging.attended, merging.left, None))
    counts = [model.macs_of(batch.mergings, grid) for batch in batches]
    ratio = sum(float(count.total.sum()) for count in counts) / (images * counts[0].static_total)
    return settings, ratio


def _quantile(found: Iterable[Match | None], count: int) -> float:
    """What `count` similarities are larger than."""
    asked = [match.similarity[match.similarity > -torch.inf] for match in found if match is not None]
    similarity = torch.cat(asked) if asked else torch.empty(0)
    if count <= 0 or not similarity.numel():
        return 1.0 + 1e-3  # no cosine is larger, rounding included
    if count >= similarity.numel():
        return -1.0 - 1e-3
    largest = similarity.topk(count + 1).values
    return float((largest[-2].double() + largest[-1].double()) / 2)
