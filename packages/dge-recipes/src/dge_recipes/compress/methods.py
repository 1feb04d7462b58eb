"""The ways to make a model cheaper, and how long each may take."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import dge_models
from dge_recipes.compress.distill import Lesson, distill
from dge_recipes.errors import UserError

__all__ = ["METHODS", "Attempt", "Request", "apply_method", "expected_seconds"]


@dataclass(frozen=True)
class Request:
    """What all methods are asked for.

    Attributes:
        dense: the model, in evaluation mode on its device. It is left as it is.
        ratio: mean MAC ratio to reach.
        splits: of routed regions, finest first.
        calibration: batches of pictures.
        fitting: batches that routers are fitted on, of the same pictures or crops of them; empty: `calibration`. The
            budget is set on `calibration` in any case.
        seed: of what methods draw.
        start: for distillation: what routing has given.
        lesson: for distillation: what it learns from, and for how long.
    """

    dense: nn.Module
    ratio: float
    splits: tuple[int, ...]
    calibration: Sequence[Tensor]
    fitting: Sequence[Tensor] = ()
    seed: int = 0
    start: nn.Module | None = None
    lesson: Lesson | None = None


@dataclass(frozen=True)
class Attempt:
    """What became of a method.

    Attributes:
        method: its name.
        model: the cheaper copy, in evaluation mode; None where there is none.
        reason: why there is none.
        seconds: that it took.
        facts: more of it, for the report.
    """

    method: str
    model: nn.Module | None
    reason: str | None
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)


def _merge(request: Request) -> tuple[nn.Module, dict[str, Any]]:
    return dge_models.merge_tokens(request.dense, request.ratio, request.calibration), {}


def _route(request: Request) -> tuple[nn.Module, dict[str, Any]]:
    model = dge_models.from_timm(request.dense, request.splits)
    seen = request.fitting or request.calibration
    dge_models.fit_routers(model, seen, request.ratio, calibration=request.calibration, seed=request.seed)
    return model, {}


def _distill(request: Request) -> tuple[nn.Module, dict[str, Any]]:
    if request.start is None or request.lesson is None:
        raise ValueError("start, lesson: got None; expected a routed model and pictures to learn from")
    found = distill(request.dense, request.start, request.ratio, request.lesson)
    return found.model, found.facts()


METHODS: dict[str, Callable[[Request], tuple[nn.Module, dict[str, Any]]]] = {
    "merge": _merge,
    "route": _route,
    "distill": _distill,
}
"""By name, those that take less time first."""

# What they take at most, in forwards of every calibration picture. Merging looks for its thresholds in at most 12
# passes. Fitting runs forward once and backward six times, then looks for the budget in at most 16 passes.
_FORWARDS = {"merge": 14, "route": 32}


def expected_seconds(method: str, seconds_per_picture: float, pictures: int) -> float:
    """How long a method may take.

    Args:
        method: its name; not that of distillation, which takes the time that it is given.
        seconds_per_picture: of the dense model's forward.
        pictures: to calibrate on.
    """
    return _FORWARDS[method] * seconds_per_picture * pictures


def apply_method(method: str, request: Request) -> Attempt:
    """Make a cheaper copy; what the method cannot do is its reason, not an error."""
    start = time.perf_counter()
    model, facts, reason = None, dict[str, Any](), None
    try:
        model, facts = METHODS[method](request)
        model.eval()
    except UserError:
        raise
    except ValueError as error:
        reason = " ".join(str(error).split())
    return Attempt(method, model, reason, time.perf_counter() - start, facts)
