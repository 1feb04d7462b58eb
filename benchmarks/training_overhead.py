"""``python -m benchmarks.training_overhead``: what the training loop adds to the bare step."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dge_recipes.cli import command_parser, run_command
from dge_recipes.errors import UserError

if TYPE_CHECKING:  # nothing heavy is imported before --help has been answered
    from torch import Tensor

    from dge_recipes.config import Config
    from dge_recipes.engine.run import Run

__all__ = ["Overhead", "main", "measure_overhead"]

_DESCRIPTION = """\
Time the training loop on random data, which cost nothing to load, against the bare step: forward, loss, backward and
optimiser on the same batches, and nothing else. Both run in short turns, and medians are compared; the learning rate
is next to nothing, so that the weights, and with them the work, stay what they are.

  python -m benchmarks.training_overhead                                     the digits' model
  python -m benchmarks.training_overhead --config deit_dge_tiny_256 train.batch_size=64

Measure on an otherwise idle machine.
"""

_RATE = 1e-9


@dataclass(frozen=True)
class Overhead:
    """What was measured.

    Attributes:
        loop_ms: median time of a step in the training loop, in milliseconds.
        bare_ms: of the bare step.
        overhead: by what fraction the loop is slower.
        data_share: fraction of the loop's time spent waiting for images.
    """

    loop_ms: float
    bare_ms: float
    overhead: float
    data_share: float


def measure_overhead(name: str, overrides: Sequence[str], steps: int, rounds: int) -> Overhead:
    """Time the loop and the bare step in turns, in one process.

    Args:
        name: a recipe; its data are replaced by random images of the same size.
        overrides: ``section.key=value`` each.
        steps: steps per round.
        rounds: rounds of each, after one that is not timed.

    Raises:
        UserError: a wrong name or override.
    """
    from dge_recipes.config import load_config
    from dge_recipes.data import build_held_out, build_training
    from dge_recipes.engine.interruption import StopSignal
    from dge_recipes.processes import start_processes
    from dge_recipes.train import assemble, train_epoch

    with tempfile.TemporaryDirectory() as folder:
        config = _on_random_data(load_config(name, overrides), steps, rounds + 1, folder)
        accelerator = start_processes(config)
        training, held_out = build_training(config, 1), build_held_out(config)
        run = assemble(config, accelerator, StopSignal(), training, held_out, init=False)
        loops, bares = [], []
        batches = list(run.train_loader)
        for _ in range(rounds + 1):
            start = time.perf_counter()
            train_epoch(run)
            loops.append((time.perf_counter() - start) / steps)
            bares.append(_bare_step(run, batches))
        run.reporter.close()
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    shares = [json.loads(line)["data_share"] for line in lines]
    loop, bare = statistics.median(loops[1:]), statistics.median(bares[1:])
    return Overhead(1e3 * loop, 1e3 * bare, loop / bare - 1, statistics.median(shares))


def _on_random_data(config: "Config", steps: int, epochs: int, folder: str) -> "Config":
    """The recipe with data that cost nothing, and one epoch per round."""
    from dge_recipes.config import DigitsData, RandomData

    batch = config.train.batch_size
    data = RandomData(
        name="random",
        image_size=config.data.image_size,
        channels=1 if isinstance(config.data, DigitsData) else 3,
        num_classes=getattr(config.data, "num_classes", None) or 10,
        num_images=batch * steps,
    )
    return config.model_copy(
        update={
            "data": data,
            "model": config.model.model_copy(update={"init_from": None}),
            "distillation": config.distillation.model_copy(update={"kind": "none"}),
            "mixing": config.mixing.model_copy(update={"mixup": 0.0, "cutmix": 0.0}),
            "optim": config.optim.model_copy(update={"lr": _RATE, "lr_batch": None}),
            "schedule": config.schedule.model_copy(update={"warmup_epochs": 0.0, "warmup_lr": 0.0, "min_lr": 0.0}),
            "train": config.train.model_copy(update={"epochs": epochs, "accumulation_steps": 1, "ema_decay": None}),
            "output": config.output.model_copy(update={"dir": folder, "trackers": ()}),
        }
    )


def _bare_step(run: "Run", batches: "Sequence[tuple[Tensor, Tensor]]") -> float:
    """Seconds of a step with nothing around it."""
    run.module.train()
    _synchronize(batches[0][0])
    start = time.perf_counter()
    for images, labels in batches:
        losses = run.module(images, labels)
        run.accelerator.backward(losses["loss"])
        if run.config.optim.clip_grad is not None:
            run.accelerator.clip_grad_norm_(run.module.parameters(), run.config.optim.clip_grad)
        run.raw_optimizer.step()
        run.raw_optimizer.zero_grad()
    _synchronize(batches[0][0])
    return (time.perf_counter() - start) / len(batches)


def _synchronize(images: "Tensor") -> None:
    if images.device.type != "cpu":
        import torch

        torch.accelerator.synchronize(images.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("benchmarks.training_overhead", lambda: _run(options), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.training_overhead", _DESCRIPTION)
    parser.add_argument("--config", default="digits", metavar="NAME_OR_FILE", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps per round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="rounds of each; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change")
    return parser


def _run(options: argparse.Namespace) -> None:
    for name in ("steps", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: expected at least 1")
    found = measure_overhead(options.config, options.overrides, options.steps, options.rounds)
    print(
        f"{options.config}: a step takes {found.loop_ms:.2f} ms in the loop and {found.bare_ms:.2f} ms bare: "
        f"{found.overhead:+.1%}, of it {found.data_share:.1%} waiting for images"
    )
    if options.json is not None:
        from dge_recipes.checkpoints.atomic_files import write_text

        write_text(options.json, json.dumps(asdict(found), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
