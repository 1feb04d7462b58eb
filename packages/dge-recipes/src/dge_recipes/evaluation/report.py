"""Evaluation of a checkpoint, from a configuration to a row of the table."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dge_recipes.checkpoints.folder import write_text
from dge_recipes.data import build_held_out
from dge_recipes.evaluation.accuracy import evaluate
from dge_recipes.evaluation.machine import machine_facts, measure_speed
from dge_recipes.evaluation.published import published_row
from dge_recipes.evaluation.subject import Subject
from dge_recipes.evaluation.table import Row, markdown_table
from dge_recipes.evaluation.tradeoff import draw_tradeoff, evaluate_budgets, tradeoff_table
from dge_recipes.models import build_model, display_name, load_weights
from dge_recipes.processes import on_main_process, start_processes

__all__ = ["evaluate_checkpoint"]


def evaluate_checkpoint(
    subject: Subject,
    *,
    best: bool = False,
    ema: bool = False,
    budgets: Sequence[float] = (),
    output: Path | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Evaluate stored weights and print their row. Every process of a launch calls it.

    Args:
        subject: model, data and weights.
        best: of a run, the best checkpoint instead of the newest.
        ema: the averaged weights.
        budgets: MAC ratios to set and evaluate beside the model as it is.
        output: a JSON file that the main process writes the numbers to.
        plot: a picture of accuracy over MACs, of the budgets.

    Returns:
        The numbers, the number of processes that took part, device and versions.

    Raises:
        UserError: anything that the user can correct.
    """
    config = subject.config
    accelerator = start_processes(config)
    held_out = build_held_out(config)
    model = build_model(config.model, held_out.num_classes, held_out.image_shape, init=False)
    if subject.weights is not None:
        load_weights(model, subject.weights, best=best, ema=ema)
    model = model.to(accelerator.device).eval()
    loader = accelerator.prepare(held_out.loader)
    evaluation = evaluate(model, loader, accelerator, held_out.num_images)
    batch_size, rounds = config.eval.batch_size, config.eval.timing_rounds
    speed = measure_speed(model, held_out.loader.dataset, batch_size, rounds, accelerator)
    name, published = display_name(config.model), published_row(config, held_out.num_classes)
    row = Row(name, evaluation.acc1, evaluation.acc5, evaluation.macs, speed, published)
    unreadable = f", {evaluation.unreadable} unreadable" if evaluation.unreadable else ""
    processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    told = f"{evaluation.images} images{unreadable}, {processes}"
    _tell(accelerator, f"{markdown_table([row])}\n{told}")
    report = {
        "model": name,
        "checkpoint": subject.weights,
        **evaluation.as_dict(),
        "images_per_second": speed,
        "published": None if published is None else asdict(published),
        **machine_facts(accelerator),
    }
    if budgets:
        points = evaluate_budgets(model, budgets, config, held_out, loader, accelerator)
        _tell(accelerator, tradeoff_table(points))
        report["budgets"] = [point.as_dict() for point in points]
        if plot is not None:
            draw_tradeoff(plot, name, points, accelerator)
    if output is not None:
        on_main_process(accelerator, lambda: write_text(output, json.dumps(report, indent=2) + "\n"))
    return report


def _tell(accelerator: Accelerator, text: str) -> None:
    if accelerator.is_main_process:
        print(text)
