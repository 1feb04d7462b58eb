"""Every method that is asked for and fits the time, one after the other."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from torch import nn

from dge_recipes.compress.crops import FITTED_ON, Crops, read_crops, with_crops
from dge_recipes.compress.distill import Lesson
from dge_recipes.compress.methods import METHODS, Attempt, Request, apply_method, expected_seconds
from dge_recipes.compress.pictures import Pictures
from dge_recipes.compress.wishes import Wishes
from dge_recipes.evaluation.speed import time_forwards
from dge_recipes.randomness import derive_seed

__all__ = ["attempt_all"]

_MINUTES = 30.0
_LEAST_STEPS = 10
_STEP_SIZE = 8
_PER_CROP = 4  # forwards that a step costs per crop: the teacher's, the copy's, and its backward pass
_ROUNDS = 12  # forwards in which the models are timed afterwards


def attempt_all(dense: nn.Module, pictures: Pictures, wishes: Wishes, tell: Callable[[str], None]) -> list[Attempt]:
    """Make a cheaper copy by every method that is asked for and fits the time.

    Args:
        dense: the model, in evaluation mode, on its device.
        pictures: to calibrate on, to learn from, and held out for who stops early.
        wishes: says which, how cheap, and how long.
        tell: called with a line whenever something begins that takes time.
    """
    begin = time.perf_counter()
    device = next(dense.parameters()).device
    calibration = [batch.to(device) for batch in pictures.calibration]
    seed = derive_seed(wishes.seed, "methods")
    request = Request(dense, wishes.ratio, wishes.splits, calibration, seed=seed)
    per_picture = _seconds_per_picture(request)
    count = sum(map(len, request.calibration))
    minutes = _MINUTES if wishes.minutes is None and wishes.method == "distill" else wishes.minutes
    attempts: list[Attempt] = []

    @cache  # two methods may want them
    def crops() -> Crops:
        return read_crops(pictures.train, pictures.section, derive_seed(wishes.seed, "crops"))

    for method in _asked(wishes):
        left = float("inf") if minutes is None else 60 * minutes - (time.perf_counter() - begin)
        if method == "distill":
            attempts.append(_attempt_distillation(request, attempts, pictures, crops, wishes, left, per_picture, tell))
            continue
        expected = expected_seconds(method, per_picture, max(count, FITTED_ON) if method == "route" else count)
        if wishes.method == "auto" and expected > left:
            attempts.append(_too_long(method, expected, left))
            continue
        tell(f"{method}: calibrating on {count} pictures, about {expected:.0f} s at most")
        if method == "route" and count < FITTED_ON:
            request = replace(request, fitting=with_crops(calibration, crops(), FITTED_ON))
        attempts.append(apply_method(method, request))
    return attempts


def _asked(wishes: Wishes) -> list[str]:
    if wishes.method == "auto":
        return [method for method in METHODS if method != "distill" or wishes.minutes is not None]
    return ["route", "distill"] if wishes.method == "distill" else [wishes.method]


def _seconds_per_picture(request: Request) -> float:
    first = request.calibration[0]
    return time_forwards({"": request.dense}, [first], rounds=1, warmup=1)[""][0] / len(first)


def _attempt_distillation(
    request: Request,
    attempts: list[Attempt],
    pictures: Pictures,
    crops: Callable[[], Crops],
    wishes: Wishes,
    left: float,
    per_picture: float,
    tell: Callable[[str], None],
) -> Attempt:
    routed = next(each for each in attempts if each.method == "route")
    if routed.model is None:
        return Attempt("distill", None, f"it starts from routing: {routed.reason}", 0.0)
    models = 2 + sum(each.model is not None for each in attempts)
    held_out = sum(map(len, pictures.held_out))
    afterwards = per_picture * models * (held_out + _ROUNDS * wishes.batch_size)
    least = per_picture * _PER_CROP * _LEAST_STEPS * _STEP_SIZE
    begin = time.perf_counter()
    tell(f"distill: reading pictures to learn from, of {len(pictures.train)}")
    learned = crops()
    seconds = left - afterwards - (time.perf_counter() - begin)
    if seconds < least:
        return _too_long("distill", least, seconds)
    device = next(request.dense.parameters()).device
    held_out_batches = [batch.to(device) for batch in pictures.held_out]
    lesson = Lesson(
        learned, request.calibration, held_out_batches, seconds, _STEP_SIZE, all_weights=wishes.all_weights, tell=tell
    )
    return apply_method("distill", replace(request, start=routed.model, lesson=lesson))


def _too_long(method: str, expected: float, left: float) -> Attempt:
    reason = f"it may take {expected / 60:.1f} minutes, and {max(left, 0) / 60:.1f} are left"
    return Attempt(method, None, reason, 0.0)
