"""The last word of a run: ``summary.json`` and a row like the published table's."""

import json
from pathlib import Path
from typing import Any

from dge_recipes.checkpoints.atomic_files import write_text
from dge_recipes.data.images import UNREADABLE_FILE
from dge_recipes.data.section import ImageSource
from dge_recipes.engine.history import draw_history
from dge_recipes.engine.run import Run
from dge_recipes.engine.run_folder import SUMMARY_FILE
from dge_recipes.engine.sharding import local_part, whole_model
from dge_recipes.evaluation import machine_facts, measure_speed
from dge_recipes.models import display_name
from dge_recipes.processes import on_main_process

__all__ = ["write_summary"]


def write_summary(run: Run) -> dict[str, Any]:
    """Time the trained model, write ``summary.json`` and print the table's row. Every process calls it."""
    config, accelerator, evaluation = run.config, run.accelerator, run.evaluations["eval"]
    summary: dict[str, Any] = {
        "model": display_name(config.model),
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "parameters_in_main_process": sum(local_part(parameter).numel() for parameter in run.model.parameters()),
        **evaluation.as_dict(),
        "images_per_second": _speed(run),
        f"best_{run.task.score_name}": run.progress.best_score,
        "epochs": config.train.epochs,
        "steps": run.progress.step,
        "skipped_steps": run.progress.skipped,
        "unreadable_images": _unreadable(run.folder),
        "left_out": {"train": _left_out(run.train_loader), "val": _left_out(run.held_out.loader)},
        "seconds": round(run.progress.seconds, 3),
        "seed": config.train.seed,
        **run.data.facts(),
        **machine_facts(accelerator),
    }
    if "ema" in run.evaluations:
        summary["ema"] = run.evaluations["ema"].as_dict()
    path = Path(config.output.dir) / SUMMARY_FILE
    on_main_process(accelerator, lambda: write_text(path, json.dumps(summary, indent=2) + "\n"))
    if run.task.curves:
        on_main_process(accelerator, lambda: draw_history(run.folder, run.task.curves))
    if accelerator.is_main_process:
        print(run.task.table(summary["model"], evaluation, summary["images_per_second"]))
    return summary


def _speed(run: Run) -> float | None:
    """None without timing, which then gathers no sharded network either."""
    rounds, held_out = run.config.eval.timing_rounds, run.held_out
    if rounds == 0:
        return None
    model = whole_model(run.config, run.model, held_out.image_shape, held_out.num_classes)
    data_set, batch_size = held_out.loader.dataset, run.config.eval.batch_size
    return measure_speed(model, data_set, batch_size, rounds, run.accelerator, run.task.first_images)


def _unreadable(folder: Path) -> int:
    """Files that the run's data sets could not read; each process lists what it met."""
    path = folder / UNREADABLE_FILE
    return len(set(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else 0


def _left_out(loader: Any) -> dict[str, int]:
    """How many of the files of a part were left out, by extension."""
    source: ImageSource | None = getattr(loader.dataset, "source", None)  # other data are no files
    return {} if source is None else source.left_out.as_dict()
