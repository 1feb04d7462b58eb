"""Doing a study's runs, each once, and collecting what they found."""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.budget_study.plan import DIGITS, Study, Variant, run_config
from benchmarks.budget_study.report import Finding, write_study
from benchmarks.budget_study.time_limit import TimeLimit
from dge_recipes.checkpoints.atomic_files import write_text
from dge_recipes.config import Config, load_config
from dge_recipes.data import build_held_out
from dge_recipes.engine.interruption import StopSignal
from dge_recipes.engine.run_folder import METRICS_FILE, SUMMARY_FILE
from dge_recipes.errors import RunStopped, UserError
from dge_recipes.evaluation.tradeoff import evaluate_budgets
from dge_recipes.models import build_model, load_weights
from dge_recipes.processes import start_processes
from dge_recipes.train import train

__all__ = ["run_study"]

_BUDGETS_FILE = "budgets.json"
_MACHINE = ("device", "cpu_threads", "mixed_precision", "python", "torch", "timm", "accelerate")


def run_study(
    output: Path,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    epochs: int | None = None,
    overrides: Sequence[str] = (),
    *,
    study: Study = DIGITS,
    timing: bool = False,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Do the runs that are not done, and write the table, the numbers and the pictures.

    A run that was stopped continues where it was; a finished one is not repeated.

    Args:
        output: the study's folder.
        variants: ways to train, the dense one first.
        seeds: one run of each variant per seed.
        epochs: instead of the recipes', for a trial.
        overrides: ``section.key=value`` for every run.
        study: that the variants belong to.
        timing: time inference, and tell what training took; for a machine that does nothing else.
        minutes: after which no run is started, and the one under way saved; None for no limit.

    Returns:
        The content of ``study.json``.

    Raises:
        RunStopped: a signal came, or the time was over before the first run was finished.
        UserError: an unknown override, or a folder that holds another study.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the study is for one process: start it with python, without a launcher")
    findings: list[Finding] = []
    machine: dict[str, Any] = {}
    places = [(seed, variant) for seed in seeds for variant in variants]
    with StopSignal() as stop, TimeLimit(minutes) as limit:
        for number, (seed, variant) in enumerate(places, start=1):
            config = run_config(output, variant, seed, epochs, overrides, study=study, timing=timing)
            print(f"{number}/{len(places)} {variant.name}, seed {seed}: {_progress(config)}")
            try:
                findings += _findings(config, variant, seed, stop)
            except RunStopped as stopped:
                if not limit.over:
                    raise
                _tell_end(minutes, number - 1, len(places), stopped)
                break
            machine = machine or _machine(config)
            # After every run: a study that is cut short has said what it knows.
            content = write_study(output, study.title, findings, machine)
    return content


def _tell_end(minutes: float | None, done: int, total: int, stopped: RunStopped) -> None:
    """The time is over.

    Raises:
        RunStopped: nothing is known yet.
    """
    told = f"the {minutes:g} minutes are over with {done} of {total} runs done; the same command continues"
    if not done:
        raise RunStopped(told) from stopped
    print(told, file=sys.stderr)


def _progress(config: Config) -> str:
    return "done before" if _done(config) is not None else f"{config.train.epochs} epochs"


def _findings(config: Config, variant: Variant, seed: int, stop: StopSignal) -> list[Finding]:
    summary = _done(config)
    if summary is None:
        if stop.request:
            raise RunStopped(f"stopped by {stop.request.name} between two runs; the same command continues")
        summary = train(config, resume="auto")
    times = {}
    if config.eval.timing_rounds:  # else whatever else the machine did would stand in the table
        times = {"seconds": summary["seconds"], "training_images_per_second": _training_speed(config)}
    points = [summary] if not variant.budgets else _at_budgets(config, variant)
    names = ("acc1", "mac_ratio", "macs", "images_per_second")
    rows = [variant.name if not variant.budgets else f"{variant.name}_at_{point['target']}" for point in points]
    return [
        Finding(row, seed, **{name: point[name] for name in names}, **times)
        for row, point in zip(rows, points, strict=True)
    ]


def _training_speed(config: Config) -> float | None:
    """Images per second of a run's median log interval."""
    path = Path(config.output.dir) / METRICS_FILE
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    speeds = [record["images_per_second"] for record in records if record["kind"] == "train"]
    return statistics.median(speeds) if speeds else None


def _machine(config: Config) -> dict[str, Any]:
    """What a finished run ran on."""
    summary = _done(config) or {}
    return {name: summary[name] for name in _MACHINE}


def _done(config: Config) -> dict[str, Any] | None:
    """The summary of a finished run of this configuration."""
    folder = Path(config.output.dir)
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SUMMARY_FILE} cannot be read: {error}") from error
    if load_config(str(folder / "config.yaml")) != config:
        raise UserError(f"{folder} holds a run of another configuration: choose another --output, or delete it")
    return summary


def _at_budgets(config: Config, variant: Variant) -> list[dict[str, Any]]:
    """The trained model at several budgets; computed once."""
    path = Path(config.output.dir) / _BUDGETS_FILE
    if path.is_file():
        kept: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    accelerator = start_processes(config)
    held_out = build_held_out(config)
    model = build_model(config.model, held_out.num_classes, held_out.image_shape, init=False)
    load_weights(model, config.output.dir)
    loader = accelerator.prepare(held_out.loader)
    model = model.to(accelerator.device).eval()
    points = evaluate_budgets(model, variant.budgets, config, held_out, loader, accelerator)
    accelerator.free_memory()
    found = [point.as_dict() for point in points]
    write_text(path, json.dumps(found, indent=2) + "\n")
    return found
