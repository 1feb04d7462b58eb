"""Writing checkpoints of a run."""

import torch

from dge_recipes.checkpoints import capture_state
from dge_recipes.errors import UserError
from dge_recipes.processes import on_main_process
from dge_recipes.training.setup import Run
from dge_recipes.training.sharding import local_part

__all__ = ["save"]


def save(run: Run, best_score: float | None = None) -> str:
    """Write a checkpoint of where the run stands. Every process calls it.

    Args:
        run: the run.
        best_score: the score that this checkpoint is the best for so far, else None.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: it cannot be written, or a weight is not finite; the checkpoints before it are intact.
    """
    _check_weights(run)
    write = capture_state(run.model, run.ema and run.ema.module, run.raw_optimizer, run.registered)
    return on_main_process(run.accelerator, lambda: str(run.store.save(run.progress.step, write, best_score)))


def _check_weights(run: Run) -> None:
    """A finite loss does not mean finite gradients: nothing broken may push out a good checkpoint."""
    finite = [local_part(parameter).isfinite().all().float() for parameter in run.model.parameters()]
    whole = run.accelerator.reduce(torch.stack(finite).min(), reduction="mean")
    if float(whole) < 1:
        raise UserError(
            f"weights are not finite after step {run.progress.step}: no checkpoint is written, those before are "
            "intact; a lower optim.lr or optim.clip_grad may help"
        )
