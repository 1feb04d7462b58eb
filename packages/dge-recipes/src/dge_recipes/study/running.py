"""Doing the study's runs, each once, and collecting what they found."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dge_recipes.checkpoints.folder import write_text
from dge_recipes.config import Config, load_config
from dge_recipes.data import build_held_out
from dge_recipes.errors import UserError
from dge_recipes.evaluation.tradeoff import evaluate_budgets
from dge_recipes.models import build_model, load_weights
from dge_recipes.processes import start_processes
from dge_recipes.study.plan import Variant, run_config
from dge_recipes.study.report import Finding, write_study
from dge_recipes.training import train

__all__ = ["run_study"]

_BUDGETS_FILE = "budgets.json"


def run_study(
    output: Path,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    epochs: int | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Do the runs that are not done, and write the table, the numbers and the picture.

    A run that was stopped continues where it was; a finished one is not repeated.

    Args:
        output: the study's folder.
        variants: ways to train, the dense one first.
        seeds: one run of each variant per seed.
        epochs: instead of the recipes', for a trial.
        overrides: ``section.key=value`` for every run.

    Returns:
        The content of ``study.json``.

    Raises:
        UserError: an unknown override, or a folder that holds another study.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the study is for one process: start it with python, without a launcher")
    findings: list[Finding] = []
    total = len(variants) * len(seeds)
    for number, (seed, variant) in enumerate(((s, v) for s in seeds for v in variants), start=1):
        config = run_config(output, variant, seed, epochs, overrides)
        print(f"{number}/{total} {variant.name}, seed {seed}: {_progress(config)}")
        findings += _findings(config, variant, seed)
        write_study(output, findings)  # after every run: a study that is cut short has said what it knows
    return write_study(output, findings)


def _progress(config: Config) -> str:
    return "done before" if _done(config) is not None else f"{config.train.epochs} epochs"


def _findings(config: Config, variant: Variant, seed: int) -> list[Finding]:
    summary = _done(config)
    if summary is None:
        summary = train(config, resume="auto")
    if not variant.budgets:
        return [Finding(variant.name, seed, summary["acc1"], summary["mac_ratio"], summary["macs"])]
    return [
        Finding(f"{variant.name}_at_{point['target']}", seed, point["acc1"], point["mac_ratio"], point["macs"])
        for point in _at_budgets(config, variant)
    ]


def _done(config: Config) -> dict[str, Any] | None:
    """The summary of a finished run of this configuration."""
    folder = Path(config.output.dir)
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'summary.json'} cannot be read: {error}") from error
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
