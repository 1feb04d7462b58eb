"""Accuracy against MACs: one checkpoint at several budgets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import default_collate

import dge_models
from dge_recipes import markdown
from dge_recipes.config import Config
from dge_recipes.data import HeldOutData
from dge_recipes.data.image_sets import plain_images
from dge_recipes.data.images import UNREADABLE
from dge_recipes.errors import UserError
from dge_recipes.evaluation.speed import measure_speed
from dge_recipes.evaluation.table import show_speed
from dge_recipes.models import is_routed, routed_part
from dge_recipes.plots import draw_curves
from dge_recipes.processes import on_main_process
from dge_recipes.tasks import Task, TaskEvaluation, task_of

__all__ = ["BudgetPoint", "calibration_batches", "draw_tradeoff", "evaluate_budgets", "tradeoff_table"]

_IMAGES = 512


@dataclass(frozen=True)
class BudgetPoint:
    """One budget.

    Attributes:
        target: the MAC ratio that was asked for.
        calibrated: the ratio reached on the training images that the routers were shifted on.
        evaluation: on the held-out images.
        images_per_second: None where it was not measured.
    """

    target: float
    calibrated: float
    evaluation: TaskEvaluation
    images_per_second: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        speed = {"images_per_second": self.images_per_second}
        return {"target": self.target, "calibrated": self.calibrated, **self.evaluation.as_dict(), **speed}


def evaluate_budgets(
    model: nn.Module,
    budgets: Sequence[float],
    config: Config,
    held_out: HeldOutData,
    loader: Any,
    accelerator: Accelerator,
) -> list[BudgetPoint]:
    """Shift a model's routers to each budget and evaluate it. Every process calls it.

    The routers are shifted on training images, so that the held-out images stay unseen.

    Args:
        model: with routed blocks, on the accelerator's device; afterwards it is at the last budget.
        budgets: MAC ratios.
        config: where the images come from, and how many rounds are timed.
        held_out: the held-out set; `loader` is its loader as prepared.
        accelerator: of this run.

    Raises:
        UserError: the model has no routers, or a budget is out of reach.
    """
    task, routed = task_of(config), routed_part(model)
    if not is_routed(routed):
        raise UserError(f"--budget needs a model with routers; {config.model.name} has none")
    batches: list[Tensor] = [batch.to(accelerator.device) for batch in task.calibration_batches(config, model)]
    points = []
    for budget in budgets:
        try:
            setting = dge_models.set_budget(routed, budget, batches)
        except ValueError as error:
            raise UserError(f"--budget {budget}: {error}") from error
        evaluation = task.evaluate(model, loader, accelerator, held_out)
        rounds = config.eval.timing_rounds
        data_set, batch_size = held_out.loader.dataset, config.eval.batch_size
        speed = measure_speed(model, data_set, batch_size, rounds, accelerator, task.first_images)
        points.append(BudgetPoint(budget, setting.ratio, evaluation, speed))
    return points


def calibration_batches(config: Config) -> list[Tensor]:
    """Evenly spaced training images, resized and cropped but not augmented, so that no held-out one is looked at.

    Args:
        config: the data set, and ``eval.batch_size``.

    Returns:
        Batches [<= eval.batch_size, C, H, W], 512 images in all or as many as there are.

    Raises:
        UserError: the data are not there.
    """
    data = plain_images(config, "train", counted=config.data.classes != "subset").images
    count = min(_IMAGES, len(data))
    samples = [data[index * len(data) // count] for index in range(count)]
    images: Tensor = default_collate([image for image, label in samples if label != UNREADABLE])
    return list(torch.split(images, config.eval.batch_size))


def tradeoff_table(points: Sequence[BudgetPoint], task: Task) -> str:
    """One line per budget, in Markdown."""
    return markdown.table(
        ("budget", "MAC ratio", *task.figures(points[0].evaluation), "mean MACs", "images/s"),
        (
            (
                f"{point.target:g}",
                f"{point.evaluation.mac_ratio:.3f}",
                *task.figures(point.evaluation).values(),
                f"{point.evaluation.macs / 1e6:.2f} M",
                show_speed(point.images_per_second),
            )
            for point in points
        ),
    )


def draw_tradeoff(path: Path, name: str, points: Sequence[BudgetPoint], task: Task, accelerator: Accelerator) -> None:
    """Draw the score over MACs. Every process calls it."""
    curve = [(point.evaluation.macs / 1e6, point.evaluation.score) for point in points]
    title, x, y = "One checkpoint at several budgets", "mean MACs per image (millions)", task.score_label
    on_main_process(accelerator, lambda: draw_curves(path, {name: curve}, title=title, x=x, y=y))
