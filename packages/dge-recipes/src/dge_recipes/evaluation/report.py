"""Evaluation of a checkpoint, from a configuration to a row of the table."""

import json
from pathlib import Path
from typing import Any

from dge_recipes.checkpoints.folder import write_text
from dge_recipes.config import Config
from dge_recipes.data import build_held_out
from dge_recipes.evaluation.accuracy import evaluate
from dge_recipes.evaluation.machine import machine_facts, measure_speed
from dge_recipes.evaluation.table import Row, markdown_table
from dge_recipes.models import build_model, display_name, load_weights
from dge_recipes.processes import on_main_process, start_processes

__all__ = ["evaluate_checkpoint"]


def evaluate_checkpoint(
    config: Config, source: str, *, best: bool = False, ema: bool = False, output: Path | None = None
) -> dict[str, Any]:
    """Evaluate stored weights and print their row. Every process of a launch calls it.

    Args:
        config: model and data.
        source: a run folder, a checkpoint folder or a weights file.
        best: of a run, the best checkpoint instead of the newest.
        ema: the averaged weights.
        output: a JSON file that the main process writes the numbers to.

    Returns:
        The numbers, the number of processes that took part, device and versions.

    Raises:
        UserError: anything that the user can correct.
    """
    accelerator = start_processes(config)
    held_out = build_held_out(config)
    model = build_model(config.model, held_out.num_classes, held_out.image_shape, init=False)
    load_weights(model, source, best=best, ema=ema)
    model = model.to(accelerator.device).eval()
    loader = accelerator.prepare(held_out.loader)
    evaluation = evaluate(model, loader, accelerator, held_out.num_images)
    batch_size, rounds = config.eval.batch_size, config.eval.timing_rounds
    speed = measure_speed(model, held_out.loader.dataset, batch_size, rounds, accelerator)
    row = Row(display_name(config.model), evaluation.acc1, evaluation.acc5, evaluation.macs, speed)
    if accelerator.is_main_process:
        print(markdown_table([row]))
        print(f"{evaluation.images} images, {accelerator.num_processes} processes")
    report = {
        "model": display_name(config.model),
        "checkpoint": source,
        **evaluation.as_dict(),
        "images_per_second": speed,
        **machine_facts(accelerator),
    }
    if output is not None:
        on_main_process(accelerator, lambda: write_text(output, json.dumps(report, indent=2) + "\n"))
    return report
