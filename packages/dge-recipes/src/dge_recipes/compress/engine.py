"""From a dense model and pictures to cheaper copies of it, measured side by side."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dge_models
from dge_recipes.compress.attempts import attempt_all
from dge_recipes.compress.choice import Choice, Result, choose
from dge_recipes.compress.fidelity import Fidelity, measure_fidelity, reads_class_token
from dge_recipes.compress.methods import Attempt
from dge_recipes.compress.pictures import Pictures
from dge_recipes.compress.report import compress_table, draw_work, machine
from dge_recipes.compress.source import Dense
from dge_recipes.compress.wishes import Wishes
from dge_recipes.errors import UserError
from dge_recipes.evaluation.speed import images_per_second, time_forwards

__all__ = ["Compressed", "compress"]

_DENSE = "dense"
_ROUNDS = 10
_DRAWN = 4


@dataclass(frozen=True)
class Compressed:
    """What came of it.

    Attributes:
        model: the chosen one, on the device, in evaluation mode.
        choice: which it is, and why.
        results: of the dense model and of every method that gave a model.
        attempts: of every method.
        class_token: whether the vectors that are compared are class tokens, else pooled features.
        facts: the report: all of this, the pictures and the machine.
    """

    model: nn.Module
    choice: Choice
    results: tuple[Result, ...]
    attempts: tuple[Attempt, ...]
    class_token: bool
    facts: dict[str, Any]

    @property
    def result(self) -> Result:
        """The chosen method's."""
        return next(each for each in self.results if each.method == self.choice.method)

    @property
    def table(self) -> str:
        """In Markdown."""
        return compress_table(self.results, self.attempts, class_token=self.class_token)

    def draw(self, pictures: Pictures) -> Any:
        """What the chosen model does with the first four of the held-out pictures."""
        images = torch.cat(pictures.held_out)[:_DRAWN]
        return draw_work(self.model, images.to(next(self.model.parameters()).device), pictures.section)


def compress(
    dense: Dense,
    pictures: Pictures,
    wishes: Wishes,
    device: torch.device,
    tell: Callable[[str], None] = lambda _: None,
) -> Compressed:
    """Make a model cheaper by every method that is asked for, and measure all of them in one run.

    Args:
        dense: the model.
        pictures: to calibrate on, and others to measure on.
        wishes: the ratio and the rest.
        device: to work on.
        tell: called with a line whenever something begins that takes time.

    Raises:
        UserError: no method gave a model: the ratio is out of reach, or the model is of another family.
    """
    start = time.perf_counter()
    model = dense.model.to(device)
    attempts = attempt_all(model, pictures, wishes, tell)
    models = {each.method: each.model for each in attempts if each.model is not None}
    if not models or wishes.method not in ("auto", *models):
        told = "; ".join(f"{each.method}: {each.reason}" for each in attempts)
        raise UserError(f"model {dense.name} cannot be made cheaper to a ratio of {wishes.ratio:g}: {told}")
    held_out = sum(map(len, pictures.held_out))
    tell(f"measuring on {held_out} held-out {'picture' if held_out == 1 else 'pictures'}")
    compared = {_DENSE: model, **models}
    fidelity = measure_fidelity(model, compared, pictures.held_out, device)
    tell(f"timing {len(compared)} models, {_ROUNDS} forwards each, in alternation")
    seconds = {each.method: each.seconds for each in attempts}
    results = _timed(compared, fidelity, _timed_batch(pictures, wishes.batch_size).to(device), seconds)
    asked = wishes.method != "auto"
    choice = Choice(wishes.method, "as asked for") if asked else choose(results[1:], wishes.ratio)
    class_token = reads_class_token(model)
    facts = {
        "model": dense.name,
        "ratio": wishes.ratio,
        "method": wishes.method,
        "splits": list(wishes.splits),
        "image_size": pictures.section.image_size,
        "batch_size": wishes.batch_size,
        "seed": wishes.seed,
        "pictures": pictures.facts,
        "vector": "class token" if class_token else "pooled features",
        "results": [each.as_dict() for each in results],
        "without_model": {each.method: each.reason for each in attempts if each.model is None},
        "more": {each.method: dict(each.facts) for each in attempts if each.facts},
        "chosen": choice.method,
        "why": choice.why,
        "seconds": time.perf_counter() - start,
        **machine(device),
    }
    return Compressed(models[choice.method], choice, tuple(results), tuple(attempts), class_token, facts)


def _timed_batch(pictures: Pictures, size: int) -> Tensor:
    """Held-out pictures, filled up with those calibrated on, and repeated where there are too few."""
    images = torch.cat([*pictures.held_out, *pictures.calibration])
    return images[torch.arange(size) % len(images)]


def _timed(
    models: Mapping[str, nn.Module], fidelity: Mapping[str, Fidelity], images: Tensor, seconds: Mapping[str, float]
) -> Sequence[Result]:
    """Results of the dense model, which comes first, and of the others, timed on the same pictures."""
    times = time_forwards(models, [images], _ROUNDS)
    speeds = {name: images_per_second(times[name], len(images)) for name in models}
    results = []
    for name, model in models.items():
        macs = dge_models.count_macs(model, images)
        implied = float(macs.static_total * len(images) / macs.total.sum())
        results.append(
            Result(name, fidelity[name], speeds[name], speeds[name] / speeds[_DENSE], implied, seconds.get(name, 0.0))
        )
    return results
