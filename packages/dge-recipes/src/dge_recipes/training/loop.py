"""The training recipe, from a configuration to a summary. Read it top down."""

import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from accelerate import skip_first_batches
from torch import Tensor

from dge_models import deterministic_routing
from dge_recipes.config import Config
from dge_recipes.evaluation import evaluate
from dge_recipes.processes import start_processes
from dge_recipes.randomness import derive_seed, seed_everything
from dge_recipes.training.bad_numbers import Place
from dge_recipes.training.clock import Clock
from dge_recipes.training.halting import halt_if_due, must_skip
from dge_recipes.training.losses import MEASURED
from dge_recipes.training.run_lock import unlock_folder
from dge_recipes.training.saving import save
from dge_recipes.training.setup import Run, set_up
from dge_recipes.training.stopping import StopSignal
from dge_recipes.training.summary import write_summary

__all__ = ["forward_backward", "train", "train_epoch"]


def train(config: Config, *, resume: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Train a model, and leave configuration, metrics, checkpoints and a summary in its folder.

    Every process of a launch calls it; call :func:`dge_recipes.processes.end_processes` before exiting.

    Args:
        config: what to do.
        resume: ``auto`` to continue in the output folder if there is something to continue, the path of a
            run or checkpoint to continue from, or None to start.
        overwrite: delete what an earlier run left in the output folder.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        RunStopped: SIGTERM, SIGHUP or Ctrl-C came; where the run stands is saved.
        UserError: anything that the user can correct.
    """
    accelerator = start_processes(config)
    try:
        with StopSignal() as stop:
            run = set_up(config, accelerator, stop, resume, overwrite)
            with closing(run.reporter):
                _train(run)
        return write_summary(run)
    finally:
        for tracker in getattr(accelerator, "trackers", []):
            tracker.finish()
        unlock_folder(Path(config.output.dir))
        accelerator.free_memory()


def _train(run: Run) -> None:
    progress = run.progress
    while progress.finished_epochs < run.config.train.epochs:
        if progress.epoch == progress.finished_epochs:  # else it was stopped between an epoch and its evaluation
            train_epoch(run)
        _finish_epoch(run)
    if not run.evaluations:  # the run was complete when it was resumed
        _evaluate(run)


def train_epoch(run: Run) -> None:
    """Train to the end of the epoch under way, from wherever in it the run stands.

    Raises:
        RunStopped: SIGTERM, SIGHUP or Ctrl-C came; where the run stands is saved.
        UserError: a loss is not finite, or a checkpoint cannot be written.
    """
    progress, accelerator, epoch = run.progress, run.accelerator, run.progress.epoch
    run.module.train()
    run.train_loader.set_epoch(epoch)
    done = progress.step_in_epoch * run.config.train.accumulation_steps
    loader = skip_first_batches(run.train_loader, done) if done else run.train_loader
    clock = Clock(progress)
    for forward, (images, labels) in enumerate(clock.waiting(loader), start=done):
        # Drop path, mixing and Gumbel noise of this forward follow from its place in the run alone.
        place = Place(progress.step + 1, (epoch, forward, accelerator.process_index))
        seed_everything(derive_seed(run.config.train.seed, "step", *place.position))
        with accelerator.accumulate(run.module):
            forward_backward(run, place, images, labels)
        if accelerator.sync_gradients:
            _finish_step(run, clock)


def forward_backward(run: Run, place: Place, images: Tensor, labels: Tensor) -> None:
    """Forward, backward and, where gradient accumulation lets it, the optimiser's step.

    Args:
        run: the run.
        place: where in it this forward is.
        images: [B, C, H, W], on the run's device.
        labels: int64 [B].
    """
    config, accelerator = run.config.train, run.accelerator
    if run.mixing is not None:
        images, labels = run.mixing(images, labels)
    answers = None
    if run.teacher is not None:
        with accelerator.autocast():
            answers = run.teacher(images)
    run.budget.begin()
    noiseless = place.position[0] >= config.epochs - run.config.budget.noiseless_epochs
    with deterministic_routing() if noiseless else nullcontext():
        losses = run.module(images, labels, answers)
    run.watch.watch(place, run.averages.scalars(losses), images, labels)
    skips = config.non_finite == "skip"
    if run.watch.look(wait=skips) is None:
        run.averages.add(losses)
    run.budget.add(losses[MEASURED])
    accelerator.backward(losses["loss"])
    if accelerator.sync_gradients:
        _update(run)


def _update(run: Run) -> None:
    """The optimiser's step, unless it has to be skipped."""
    skipped = run.config.train.non_finite == "skip" and must_skip(run)
    if not skipped:
        if run.config.optim.clip_grad is not None:
            run.accelerator.clip_grad_norm_(run.module.parameters(), run.config.optim.clip_grad)
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.budget.finish(skipped=skipped)


def _finish_step(run: Run, clock: Clock) -> None:
    """Schedule, average, log and save after an optimiser step."""
    progress, config = run.progress, run.config
    lr = run.raw_optimizer.param_groups[0]["lr"]
    progress.step += 1
    run.stop.worth_saving = True
    run.schedule.step_update(progress.step)
    if run.ema is not None:
        run.ema.update(run.model, step=progress.step)
    run.reporter.step()
    clock.steps += 1
    ends_epoch = progress.step_in_epoch == 0
    if progress.step % config.train.log_every == 0 or ends_epoch:
        means = run.averages.pop()
        run.reporter.training(means, lr, clock.lap())
    saves = _at_every_steps(run)
    halt_if_due(run, before_saving=saves or ends_epoch)
    if saves and not ends_epoch:  # at an epoch's end, after its evaluation
        clock.lap()
        save(run)
        clock.restart()


def _finish_epoch(run: Run) -> None:
    """Evaluate and save after an epoch, as often as the configuration says and after the last."""
    config, progress = run.config, run.progress
    last = progress.step == run.total_steps
    best = None
    if last or progress.epoch % config.train.eval_every == 0:
        start = time.perf_counter()
        _evaluate(run)
        progress.seconds += time.perf_counter() - start
        score = max(evaluation.acc1 for evaluation in run.evaluations.values())
        if score > progress.best_score:
            progress.best_score = best = score
    progress.finished_epochs = progress.epoch
    due = progress.epoch % config.checkpoint.every_epochs == 0 or _at_every_steps(run)
    if last or best is not None or due:
        save(run, best)


def _at_every_steps(run: Run) -> bool:
    every = run.config.checkpoint.every_steps
    return every is not None and run.progress.step % every == 0


def _evaluate(run: Run) -> None:
    """Evaluate the network, and its moving average if there is one. A request to stop is not kept waiting."""
    networks = {"eval": run.model} if run.ema is None else {"eval": run.model, "ema": run.ema.module}
    done = {
        name: evaluate(
            network,
            run.held_out_loader,
            run.accelerator,
            run.held_out.num_images,
            after_batch=lambda: halt_if_due(run, before_saving=False),
        )
        for name, network in networks.items()
    }
    for name, evaluation in done.items():  # all or none: a run that is stopped between two evaluates both again
        run.reporter.evaluation(evaluation.as_dict(), name)
    run.evaluations.update(done)
