"""Routed copies taught by the dense model itself, on pictures without labels, for as long as there is time.

This loop is no run of ``dge-train``: it has one process, no checkpoints, and nothing to resume.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import dge_models
from dge_recipes.compress.crops import Crops
from dge_recipes.compress.fidelity import Fidelity, measure_fidelity
from dge_recipes.compress.pictures import spread
from dge_recipes.compress.teaching import Manner, Teacher, kept_routing

__all__ = ["Distilled", "Lesson", "choose_parameters", "distill"]

_LR = 5e-4  # of norms, biases and layer scales; matrices learn at a share of it, see Manner.matrices
_BREADTH = 128  # pictures, from which on matrices learn too: those of fewer forget what the pictures do not show
_WARMUP = 10  # steps
_BETAS = 0.9, 0.99  # few steps: a longer memory would not fill
_CLIP = 1.0
_PATIENCE = 6  # evaluations without a better one
_EVALUATION_SHARE = 0.2
_SETTLED_ON = 64  # pictures that the budget is set on between evaluations


@dataclass(frozen=True)
class Lesson:
    """What distillation needs beside the model.

    Attributes:
        crops: random crops of the pictures to learn from.
        calibration: batches that the budget is set on.
        held_out: batches that say when to stop.
        seconds: that it may take.
        batch_size: crops per step.
        steps: that it takes at most; None: as many as there is time for.
        all_weights: train all weights, not norms, biases and layer scales alone; None: where there are at least 128
            pictures. Routers are never trained.
        lr: peak learning rate of norms, biases and layer scales; None: 5e-4.
        tell: called with a line at every evaluation.
        manner: how it is taught.
        look: called with the step and the model at every evaluation, such as to measure more.
    """

    crops: Crops
    calibration: Sequence[Tensor]
    held_out: Sequence[Tensor]
    seconds: float
    batch_size: int = 8
    steps: int | None = None
    all_weights: bool | None = None
    lr: float | None = None
    tell: Callable[[str], None] = lambda _: None
    manner: Manner = field(default_factory=Manner)
    look: Callable[[int, nn.Module], None] = lambda step, model: None


@dataclass(frozen=True)
class Point:
    """An evaluation on the held-out pictures, the budget set anew before it."""

    step: int
    seconds: float
    fidelity: Fidelity

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"step": self.step, "seconds": round(self.seconds, 1), **self.fidelity.as_dict()}


@dataclass(frozen=True)
class Distilled:
    """What came of it.

    Attributes:
        model: the best one on the held-out pictures, in evaluation mode; the start itself where none was better.
        curve: all evaluations, the start's first.
        best: the model's place in it.
        parameters: how many were trained.
        pictures: that crops were taken from.
    """

    model: nn.Module
    curve: tuple[Point, ...]
    best: int
    parameters: int
    pictures: int

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {
            "steps": self.curve[-1].step,
            "best_step": self.curve[self.best].step,
            "parameters": self.parameters,
            "pictures": self.pictures,
            "curve": [point.as_dict() for point in self.curve],
        }


def distill(dense: nn.Module, start: nn.Module, ratio: float, lesson: Lesson) -> Distilled:
    """Teach a routed copy to answer as the dense model does.

    Pictures are routed as in evaluation, by routers that stay as they are; so each step costs what the copy costs, and
    what the teacher says of a batch is learned from several times. The loss is that of
    :meth:`~dge_recipes.compress.teaching.Teacher.loss`. The learning rate falls to nothing in the last two fifths of
    the time. What is evaluated and handed out is a running average of the parameters. Changed tokens are routed
    otherwise, so the budget is set again before every evaluation.

    Args:
        dense: the teacher, in evaluation mode.
        start: a routed copy at the ratio; it is left as it is.
        ratio: MAC ratio to hold.
        lesson: pictures and time.

    Returns:
        The evaluation with the best score, once more at the ratio on all of the calibration pictures: what is handed
        out is never worse on the held-out pictures than the start.

    Raises:
        ValueError: the budget cannot be set.
    """
    course = _Course(dense, start, ratio, lesson)
    course.run()
    return course.result()


class _Course:
    """A copy that learns, how it did so far, and the best that it was."""

    def __init__(self, dense: nn.Module, start: nn.Module, ratio: float, lesson: Lesson) -> None:
        self._dense, self._start, self._ratio, self._lesson = dense, start, ratio, lesson
        self._began = time.perf_counter()
        self._device = next(dense.parameters()).device
        self._model = copy.deepcopy(start).eval()
        broad = len(lesson.crops) >= _BREADTH if lesson.all_weights is None else lesson.all_weights
        self._parameters = choose_parameters(self._model, all_weights=broad and lesson.manner.matrices > 0)
        self._teacher = Teacher(dense, lesson.crops, lesson.batch_size, lesson.manner)
        self._average = [each.detach().clone() for each in self._parameters]
        self._few = _spread(lesson.calibration, _SETTLED_ON)
        self._step, self._best = 0, 0
        self._curve: list[Point] = []
        self._state: dict[str, Tensor] = {}
        self._evaluate(settle=False)

    def run(self) -> None:
        """Learn until the time is over, or nothing gets better any more."""
        lesson = self._lesson
        optimizer = torch.optim.AdamW(self._groups(), betas=_BETAS, weight_decay=0.0)
        peaks = [group["lr"] for group in optimizer.param_groups]
        # One more evaluation, and setting the budget on all pictures, have to fit.
        lasted, since = self._seconds(), time.perf_counter()
        while self._seconds() < lesson.seconds - 3 * lasted and self._step != lesson.steps:
            warm = min((self._step + 1) / _WARMUP, 1.0)
            left = (1 - self._passed(3 * lasted)) / (1 - lesson.manner.flat)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min(warm, 1.0, max(left, 0.0))
            self._learn(optimizer)
            if lasted < _EVALUATION_SHARE * (time.perf_counter() - since):
                since = time.perf_counter()
                self._evaluate()
                lasted, since = time.perf_counter() - since, time.perf_counter()
                if len(self._curve) - 1 - self._best >= _PATIENCE:
                    return
        if self._curve[-1].step != self._step:
            self._evaluate()

    def result(self) -> Distilled:
        """The best that it was, or the start."""
        chosen, best = copy.deepcopy(self._start).eval(), self._best
        if best:
            chosen.load_state_dict(self._state)
            dge_models.set_budget(chosen, self._ratio, self._lesson.calibration)
            found = measure_fidelity(self._dense, {"": chosen}, self._lesson.held_out, self._device)[""]
            if found.score < self._curve[0].fidelity.score:
                chosen, best = copy.deepcopy(self._start).eval(), 0
        count = sum(each.numel() for each in self._parameters)
        return Distilled(chosen, tuple(self._curve), best, count, len(self._lesson.crops))

    def _groups(self) -> list[dict[str, Any]]:
        peak = self._lesson.lr or _LR
        vectors = [each for each in self._parameters if each.ndim <= 1]
        matrices = [each for each in self._parameters if each.ndim > 1]
        groups = [(vectors, peak), (matrices, peak * self._lesson.manner.matrices)]
        return [{"params": parameters, "lr": lr} for parameters, lr in groups if parameters]

    def _learn(self, optimizer: torch.optim.Optimizer) -> None:
        taught, manner = self._teacher.batch(self._step), self._lesson.manner
        with kept_routing(self._model), _autocast(self._device, half=manner.half):
            loss = self._teacher.loss(self._model, taught)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, _CLIP, error_if_nonfinite=True)
        optimizer.step()
        self._step += 1
        kept = min(manner.average, 1 - 1 / self._step)  # the first steps count alike
        with torch.no_grad():
            for average, parameter in zip(self._average, self._parameters, strict=True):
                average.lerp_(parameter, 1 - kept)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model has the average of what it learned."""
        with torch.no_grad():
            learned = [each.detach().clone() for each in self._parameters]
            for parameter, average in zip(self._parameters, self._average, strict=True):
                parameter.copy_(average)
            yield
            for parameter, value in zip(self._parameters, learned, strict=True):
                parameter.copy_(value)

    def _evaluate(self, *, settle: bool = True) -> None:
        """Measure the average; with `settle` the budget is set anew before."""
        with self._averaged():
            if settle:
                dge_models.set_budget(self._model, self._ratio, self._few)
            found = measure_fidelity(self._dense, {"": self._model}, self._lesson.held_out, self._device)[""]
            self._curve.append(Point(self._step, self._seconds(), found))
            if found.score > self._curve[self._best].fidelity.score:
                self._best = len(self._curve) - 1
                self._state = {name: value.detach().clone() for name, value in self._model.state_dict().items()}
            cosines = f"class cosine {found.class_cosine:.4f}, token {found.token_cosine:.4f}"
            passed = f"{self._seconds():.0f} of {self._lesson.seconds:.0f} s"
            self._lesson.tell(
                f"distill: step {self._step}, {passed}, MAC ratio {found.mac_ratio:.3f}, {cosines} on held-out pictures"
            )
            self._lesson.look(self._step, self._model)

    def _passed(self, rest: float) -> float:
        """The share of the time but `rest` seconds that has passed, or of the steps where those come first."""
        taken = self._step / self._lesson.steps if self._lesson.steps else 0.0
        return max(self._seconds() / max(self._lesson.seconds - rest, 1e-3), taken)

    def _seconds(self) -> float:
        return time.perf_counter() - self._began


def choose_parameters(model: nn.Module, *, all_weights: bool = False, routers_too: bool = False) -> list[nn.Parameter]:
    """Have some parameters of a routed copy learn; the others want no gradient afterwards.

    Args:
        model: changed in place.
        all_weights: all of them, not norms, biases and layer scales alone.
        routers_too: the routers learn as well.

    Returns:
        Those that learn.
    """
    routers = [module for module in model.modules() if isinstance(module, dge_models.Router)]
    of_routers = {id(parameter) for router in routers for parameter in router.parameters()}
    chosen = []
    for parameter in model.parameters():
        learns = routers_too if id(parameter) in of_routers else all_weights or parameter.ndim == 1
        parameter.requires_grad_(learns)
        if learns:
            chosen.append(parameter)
    return chosen


def _autocast(device: torch.device, *, half: bool) -> torch.autocast:
    """Matrices in bfloat16 where the processor multiplies them faster so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half and _multiplies_bfloat16(device))


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    ask = getattr(torch.cpu, "get_capabilities", None)  # PyTorch 2.10 cannot say
    can = {} if ask is None else ask()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def _spread(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """At most so many of the pictures, evenly spaced."""
    pictures = torch.cat(list(batches))
    if len(pictures) <= count:
        return list(batches)
    return list(pictures[spread(len(pictures), count)].split(len(batches[0])))
