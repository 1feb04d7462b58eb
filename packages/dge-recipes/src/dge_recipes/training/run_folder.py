"""A run's folder: who may write into it, and whether a stopped run can continue there."""

import json
import shutil
from pathlib import Path
from typing import Any

from dge_recipes.checkpoints import CheckpointStore
from dge_recipes.checkpoints.folder import write_text
from dge_recipes.checkpoints.locate import CHECKPOINTS, find_checkpoint
from dge_recipes.config import Config, dump_config, load_config
from dge_recipes.data.images import UNREADABLE_FILE
from dge_recipes.errors import UserError
from dge_recipes.training.bad_numbers import BAD_BATCHES
from dge_recipes.training.run_lock import lock_folder

__all__ = [
    "CONFIG_FILE",
    "METRICS_FILE",
    "SUMMARY_FILE",
    "claim_run_folder",
    "find_resume_point",
    "rewind_metrics",
]

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"

# Changing these between two starts of a run does not change what it computes. Batch size and accumulation may be
# traded against processes: that images per step stay the same is checked where the number of processes is known.
_FREE = {"output", "checkpoint", "eval"}
_FREE_KEYS = {
    "model.init_from",
    "train.batch_size",
    "train.accumulation_steps",
    "train.log_every",
    "train.eval_every",
    "train.device",
    "train.shard",
    "train.non_finite",
    "train.skip_limit",
    "data.workers",
    "data.root",
    "distillation.weights",
}


def find_resume_point(config: Config, resume: str | None, overwrite: bool) -> str | None:
    """Check that a run may use its folder, and find the checkpoint to continue from. Writes nothing.

    Args:
        config: of this run.
        resume: ``auto`` (continue in this folder if there is something to continue), a path, or None.
        overwrite: an earlier run's files in the folder may be deleted.

    Returns:
        The checkpoint folder to continue from, or None to start.

    Raises:
        UserError: the folder is in use, or the checkpoint is damaged or of another configuration.
    """
    folder = Path(config.output.dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output.dir={folder} is a file; expected a folder, which need not exist")
    checkpoint = None
    if resume == "auto":
        checkpoint = CheckpointStore(folder / CHECKPOINTS).newest_intact()
    elif resume is not None:
        checkpoint = find_checkpoint(resume)
    if checkpoint is not None:
        _check_same_run(config, checkpoint)
    if not (overwrite or _continues(folder, resume, checkpoint)) and _in_use(folder):
        raise UserError(
            f"output folder {folder} is not empty: choose another (output.dir=...), continue it with "
            "--resume auto, or replace it with --overwrite"
        )
    return None if checkpoint is None else str(checkpoint)


def claim_run_folder(config: Config, resume: str | None, checkpoint: str | None) -> None:
    """Make the run's folder, lock it and record the configuration in it; an earlier run's files go, unless continued.

    Args:
        config: of this run.
        resume: as given to :func:`find_resume_point`, which must have been called.
        checkpoint: as returned by it.

    Raises:
        UserError: the folder cannot be written, or another run is writing there.
    """
    folder = Path(config.output.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        if not _continues(folder, resume, None if checkpoint is None else Path(checkpoint)):
            _remove_run(folder)
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written: {error}") from error
    write_text(folder / CONFIG_FILE, dump_config(config))


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines that a stopped run logged after the checkpoint it continues from."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = _record(line)
        if record is not None and record.get("step", 0) <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _in_use(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _continues(folder: Path, resume: str | None, checkpoint: Path | None) -> bool:
    """Whether the files in the folder belong to the run that goes on."""
    return resume == "auto" or (checkpoint is not None and folder.resolve() in checkpoint.resolve().parents)


def _remove_run(folder: Path) -> None:
    """Delete what a run writes, and nothing else that may lie beside it."""
    for name in (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, UNREADABLE_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, "tensorboard", BAD_BATCHES):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)


def _check_same_run(config: Config, checkpoint: Path) -> None:
    recorded = checkpoint.parent.parent / CONFIG_FILE
    if not recorded.is_file():
        return
    before, now = _flat(load_config(str(recorded))), _flat(config)
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key) and _matters(key)]
    if changed:
        shown = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:3])
        raise UserError(f"cannot continue {checkpoint}: {shown}; expected the same configuration")


def _matters(key: str) -> bool:
    return key not in _FREE_KEYS and key.split(".")[0] not in _FREE


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
    }


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # the line that was being written when the run was killed
        return None
    return record if isinstance(record, dict) else None
