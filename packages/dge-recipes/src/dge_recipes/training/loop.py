"""The training recipe, from a configuration to a summary. Read it top down."""

import math
import time
from contextlib import closing, nullcontext
from typing import Any

from accelerate import skip_first_batches
from torch import Tensor

from dge_models import deterministic_routing
from dge_recipes.checkpoints import capture_state
from dge_recipes.config import Config
from dge_recipes.errors import UserError
from dge_recipes.evaluation import evaluate
from dge_recipes.processes import on_main_process, start_processes
from dge_recipes.randomness import derive_seed, seed_everything
from dge_recipes.training.setup import Run, set_up
from dge_recipes.training.summary import write_summary

__all__ = ["train"]


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
        UserError: anything that the user can correct.
    """
    accelerator = start_processes(config)
    run = set_up(config, accelerator, resume, overwrite)
    with closing(run.reporter):
        while run.progress.step < run.total_steps:
            _train_epoch(run)
            _finish_epoch(run)
        if not run.evaluations:  # the run was complete when it was resumed
            _evaluate(run)
    summary = write_summary(run)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.free_memory()
    return summary


def _train_epoch(run: Run) -> None:
    """Train to the end of the epoch under way, from wherever in it the run stands."""
    progress, accelerator, epoch = run.progress, run.accelerator, run.progress.epoch
    run.module.train()
    run.train_loader.set_epoch(epoch)
    done = progress.step_in_epoch * run.config.train.accumulation_steps
    loader = skip_first_batches(run.train_loader, done) if done else run.train_loader
    clock = _Clock()
    for forward, (images, labels) in enumerate(loader, start=done):
        # Drop path, mixing and Gumbel noise of this forward follow from its place in the run alone.
        position = (epoch, forward, accelerator.process_index)
        seed_everything(derive_seed(run.config.train.seed, "step", *position))
        with accelerator.accumulate(run.module):
            _forward_backward(run, images, labels)
        if accelerator.sync_gradients:
            _finish_step(run, clock)


def _forward_backward(run: Run, images: Tensor, labels: Tensor) -> None:
    if run.mixing is not None:
        images, labels = run.mixing(images, labels)
    noiseless = run.progress.epoch >= run.config.train.epochs - run.config.budget.noiseless_epochs
    with deterministic_routing() if noiseless else nullcontext():
        losses = run.module(images, labels)
    run.averages.add(losses)
    run.accelerator.backward(losses["loss"])
    if run.accelerator.sync_gradients and run.config.optim.clip_grad is not None:
        run.accelerator.clip_grad_norm_(run.module.parameters(), run.config.optim.clip_grad)
    run.optimizer.step()
    run.optimizer.zero_grad()


def _finish_step(run: Run, clock: "_Clock") -> None:
    """Schedule, average, log and save after an optimiser step."""
    progress, config = run.progress, run.config
    lr = run.raw_optimizer.param_groups[0]["lr"]
    progress.step += 1
    run.schedule.step_update(progress.step)
    if run.ema is not None:
        run.ema.update(run.model, step=progress.step)
    run.reporter.step()
    clock.steps += 1
    if progress.step % config.train.log_every == 0 or progress.step_in_epoch == 0:
        means = run.averages.pop(run.accelerator)
        if not math.isfinite(means["loss"]):
            terms = ", ".join(f"{name} {means[name]}" for name in ("task", "budget"))
            raise UserError(f"the loss is not finite at step {progress.step} ({terms}); a lower optim.lr may help")
        run.reporter.training(means, lr, clock.lap(progress))
    every = config.checkpoint.every_steps
    if every is not None and progress.step % every == 0 and progress.step_in_epoch != 0:
        clock.lap(progress)
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
    if last or best is not None or progress.epoch % config.checkpoint.every_epochs == 0:
        save(run, best)


def _evaluate(run: Run) -> None:
    """Evaluate the network, and its moving average if there is one."""
    networks = {"eval": run.model} if run.ema is None else {"eval": run.model, "ema": run.ema.module}
    for name, network in networks.items():
        evaluation = evaluate(network, run.held_out_loader, run.accelerator, run.held_out.num_images)
        run.evaluations[name] = evaluation
        run.reporter.evaluation(evaluation.as_dict(), name)


def save(run: Run, best_score: float | None = None) -> None:
    """Write a checkpoint of where the run stands. Every process calls it."""
    write = capture_state(run.model, run.ema and run.ema.module, run.raw_optimizer, run.registered)
    on_main_process(run.accelerator, lambda: str(run.store.save(run.progress.step, write, best_score)))


class _Clock:
    """Time spent training since the last report."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.steps, self._start = 0, time.perf_counter()

    def lap(self, progress: Any) -> float:
        """Images per second since the last call; the time is added to the run's."""
        elapsed = time.perf_counter() - self._start
        progress.seconds += elapsed
        speed = self.steps * progress.global_batch / elapsed
        self.restart()
        return float(speed)
