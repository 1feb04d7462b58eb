"""Another budget for a trained model, without training: one shift of all router logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn

from dge_models.budget import check_target
from dge_models.finding import find_routed
from dge_models.merge_tokens import MergeSetting, set_merge_ratio
from dge_models.merged import MergedTransformer
from dge_models.merging_trace import find_merged
from dge_models.projections import own_parameter
from dge_models.routed import routed_blocks
from dge_models.router import split_costs
from dge_models.routing_stats import Observation, observe, refuse_fixed, refuse_iterator

__all__ = ["BudgetSetting", "set_budget"]

_MAX_PASSES = 16


@dataclass(frozen=True)
class BudgetSetting:
    """What :func:`set_budget` did.

    Attributes:
        target: The MAC ratio that was asked for.
        ratio: The mean MAC ratio reached on the loader's images.
        shift: What the finest split's logit gained over a split of no cost, in every routed block.
        cheapest: The smallest mean MAC ratio that routing could reach on these images.
        images: Images per pass.
        passes: Passes over the loader.
    """

    target: float
    ratio: float
    shift: float
    cheapest: float
    images: int
    passes: int


@dataclass(frozen=True)
class _Trial:
    shift: float
    seen: Observation


@overload  # a wrapper may hold either kind, which no type says
def set_budget(  # type: ignore[overload-overlap]
    model: MergedTransformer, ratio: float, loader: Iterable[Any], *, tolerance: float = 0.02
) -> MergeSetting: ...
@overload
def set_budget(model: nn.Module, ratio: float, loader: Iterable[Any], *, tolerance: float = 0.02) -> BudgetSetting: ...
def set_budget(
    model: nn.Module, ratio: float, loader: Iterable[Any], *, tolerance: float = 0.02
) -> BudgetSetting | MergeSetting:
    """Make a trained model spend a given share of its MACs, by shifting its router logits.

    The same number, times each split's cost (:func:`split_costs`), is added to the logits of every routed
    block: a price per query, under which the regions that gain least from fine splits give them up first. The
    shift is folded into ``router.gate.bias``, so checkpoints, kernels and exported models need to know nothing
    of it, and can be set again at will. It ends what :class:`RandomBudget` shifted for training.

    The search keeps a bracket around the target. Each pass over the loader is a real one, because later layers
    see other tokens when earlier ones route differently; the recorded logits of a pass predict where to look
    next, so that some 3 to 6 passes suffice. It aims for a tenth of `tolerance`.

    Of a model from :func:`merge_tokens` it finds other thresholds, or other counts where they are constant.

    Args:
        model: With routed blocks, trained, or a module that holds one such model; changed in place. Its training modes
            are kept.
        ratio: Mean MAC ratio to reach, from the model's cheapest to 1.
        loader: Batches of images [B, C, H, W], or sequences that start with one; read once per pass, so a list
            or a data loader that gives the same images every time, and no iterator. A few hundred images of
            the kind that the model will see are enough.
        tolerance: Largest difference to `ratio` to accept; ratios 1 and the cheapest are met exactly.

    Returns:
        What was reached, and how.

    Raises:
        TypeError: The loader is an iterator or yields something else than images.
        ValueError: `ratio` is outside (0, 1] or below the cheapest routing, there are no images, the model has
            no routers, fixed queries, or gates whose biases can't be set (quantised, offloaded), or no shift
            reaches `ratio`, because the routers can't tell regions apart. The model is then as it was.
    """
    check_target("ratio", ratio)
    if not tolerance > 0:
        raise ValueError(f"tolerance: got {tolerance}; expected a positive number")
    merged = find_merged(model)
    if merged is not None:
        constant = merged.even and any(block.count for block in merged.blocks)
        return set_merge_ratio(merged, ratio, loader, not constant, tolerance=tolerance)
    model = find_routed(model)
    refuse_fixed(model)
    refuse_iterator(loader)
    with _biases_kept_on_failure(model) as shift_to:
        best, passes = _search(model, ratio, loader, tolerance, shift_to)
        shift_to(best.shift)
    for block in routed_blocks(model):
        block.router.shift_training(None)
    return BudgetSetting(float(ratio), best.seen.ratio, best.shift, best.seen.cheapest, best.seen.images, passes)


@contextmanager
def _biases_kept_on_failure(model: nn.Module) -> Iterator[Any]:
    """Gives a function that sets the shift relative to the weights that were there before."""
    routers = [block.router for block in routed_blocks(model)]
    biases = [own_parameter(router.gate, "bias") for router in routers]
    before = [bias.detach().clone() for bias in biases]

    def shift_to(shift: float) -> None:
        with torch.no_grad():
            for router, bias, kept in zip(routers, biases, before, strict=True):
                price = split_costs(router.splits).to(kept.device)
                bias.copy_(kept + shift * price if shift else kept)

    try:
        yield shift_to
    except BaseException:
        shift_to(0.0)
        raise


def _search(
    model: nn.Module, ratio: float, loader: Iterable[Any], tolerance: float, shift_to: Any
) -> tuple[_Trial, int]:
    """The trial closest to `ratio`, and the number of trials; a ValueError if it isn't close enough."""
    below: _Trial | None = None
    above: _Trial | None = None
    best: _Trial | None = None
    shift, passes = 0.0, 0
    while passes < _MAX_PASSES:
        shift_to(shift)
        trial, passes = _Trial(shift, observe(model, loader, lowest=ratio)), passes + 1
        if best is None or abs(trial.seen.ratio - ratio) < abs(best.seen.ratio - ratio):
            best = trial
        aim = tolerance / 10 if trial.seen.cheapest + 1e-6 < ratio < 1 else 1e-6
        if abs(best.seen.ratio - ratio) <= aim:
            return best, passes
        if trial.seen.ratio < ratio:
            below = trial
        else:
            above = trial
        if below and above and above.shift - below.shift < 1e-4 * (1 + abs(shift)):
            break
        shift = _next_shift(trial, below, above, ratio)
    if best is None or abs(best.seen.ratio - ratio) > tolerance:
        raise ValueError(_unreachable(ratio, below, above))
    return best, passes


def _next_shift(trial: _Trial, below: _Trial | None, above: _Trial | None, ratio: float) -> float:
    """Where the recorded logits say that the ratio is met, kept well inside the bracket."""
    reach = 1.05 * trial.seen.spread()
    low, high = (0.0, reach) if trial.seen.ratio < ratio else (-reach, 0.0)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if trial.seen.predict(middle) < ratio else (low, middle)
    # The end that has reached the target, as seen from where the trial is.
    guess = trial.shift + (high if trial.seen.ratio < ratio else low)
    if below is None or above is None:
        return guess
    margin = 0.02 * (above.shift - below.shift)
    return min(max(guess, below.shift + margin), above.shift - margin)


def _unreachable(ratio: float, below: _Trial | None, above: _Trial | None) -> str:
    jump = ""
    if below is not None and above is not None:
        jump = f": it jumps from {below.seen.ratio:.3f} to {above.seen.ratio:.3f} at a shift of {above.shift:.4g}"
    return (
        f"ratio: no shift of the router logits gives {ratio}{jump}; routers that can't tell regions apart, "
        "such as those of a converted model before training, offer a few ratios only"
    )
