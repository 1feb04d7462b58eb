"""Evaluation of a checkpoint, from what a user names to a row of the table.

Its command line is ``commands/evaluate.py``.
"""

import sys

from dge_recipes.commands.evaluate import main

if __name__ == "__main__":  # before PyTorch is imported, which reads then what the command line sets
    sys.exit(main())

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dge_recipes.checkpoints.atomic_files import write_text
from dge_recipes.checkpoints.stored_classes import stored_classes
from dge_recipes.data import HeldOutData
from dge_recipes.evaluation.speed import machine_facts, measure_speed
from dge_recipes.evaluation.table import published_row
from dge_recipes.evaluation.target import Target
from dge_recipes.evaluation.tradeoff import draw_tradeoff, evaluate_budgets, tradeoff_table
from dge_recipes.models import display_name, load_weights
from dge_recipes.processes import on_every_process, on_main_process, start_processes
from dge_recipes.tasks import task_of

__all__ = ["evaluate_checkpoint", "main"]


def evaluate_checkpoint(
    target: Target,
    *,
    best: bool = False,
    ema: bool = False,
    budgets: Sequence[float] = (),
    output: Path | None = None,
    plot: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluate stored weights. Every process of a launch calls it.

    Args:
        target: model, data and weights.
        best: of a run, the best checkpoint instead of the newest.
        ema: the averaged weights.
        budgets: MAC ratios to set and evaluate beside the model as it is.
        output: a JSON file that the main process writes the numbers to.
        plot: a picture of accuracy over MACs, of the budgets.
        tell: called in the main process with each table, as soon as it is known.

    Returns:
        The numbers, the number of processes that took part, device and versions.

    Raises:
        UserError: anything that the user can correct.
    """
    config, task = target.config, task_of(target.config)
    accelerator = start_processes(config)
    tell = tell if accelerator.is_main_process else lambda _: None
    weights = on_every_process(accelerator, lambda: target.find_weights(best=best, ema=ema))
    held_out = on_every_process(accelerator, lambda: _held_out(target, weights))
    model = task.build_model(config, held_out.num_classes, held_out.image_shape, init=False)
    if weights is not None:
        load_weights(model, str(weights[0]), ema=weights[1])
    model = model.to(accelerator.device).eval()
    loader = accelerator.prepare(held_out.loader)
    evaluation = task.evaluate(model, loader, accelerator, held_out)
    batch_size, rounds = config.eval.batch_size, config.eval.timing_rounds
    speed = measure_speed(model, held_out.loader.dataset, batch_size, rounds, accelerator, task.first_images)
    name, published = display_name(config.model), published_row(config, _count(held_out))
    unreadable = f", {evaluation.unreadable} unreadable" if evaluation.unreadable else ""
    processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    told = f"{evaluation.images} images{unreadable}, {processes}{_tell_classes(held_out)}"
    tell(f"{task.table(name, evaluation, speed, published)}\n{told}")
    report = {
        "model": name,
        "checkpoint": target.weights,
        **evaluation.as_dict(),
        "num_classes": _count(held_out),
        "classes": _names(held_out),
        "data": {"num_images": held_out.num_images, "digest": held_out.identity.digest},
        "images_per_second": speed,
        "published": None if published is None else asdict(published),
        **machine_facts(accelerator),
    }
    if budgets:
        points = evaluate_budgets(model, budgets, config, held_out, loader, accelerator)
        tell(tradeoff_table(points, task))
        report["budgets"] = [point.as_dict() for point in points]
        if plot is not None:
            draw_tradeoff(plot, name, points, task, accelerator)
    if output is not None:
        on_main_process(accelerator, lambda: write_text(output, json.dumps(report, indent=2) + "\n"))
    return report


def _held_out(target: Target, weights: tuple[Path, bool] | None) -> HeldOutData:
    """The held-out images, their labels matched with the classes that the weights know."""
    classes = target.own_classes if weights is None else stored_classes(weights[0])
    known = f"the weights {target.weights or target.config.model.name} know"
    return task_of(target.config).build_held_out(target.config, classes, known)


def _count(held_out: HeldOutData) -> int:
    """Classes that the evaluation tells apart."""
    return held_out.num_classes if held_out.match is None else held_out.match.count


def _names(held_out: HeldOutData) -> list[str] | None:
    """Their names in the data set, if it has some."""
    names, places = held_out.identity.classes.names, None if held_out.match is None else held_out.match.places
    if names is None:
        return None
    return [name for label, name in enumerate(names) if places is None or places[label] >= 0]


def _tell_classes(held_out: HeldOutData) -> str:
    """What is not as usual: fewer classes than the model knows, or classes that only their numbers tell apart."""
    count, match = _count(held_out), held_out.match
    among = "" if count == held_out.num_classes else f", among {count} of {held_out.num_classes} classes"
    return among if match is None or match.by == "name" else f"{among}, classes compared by number alone"
