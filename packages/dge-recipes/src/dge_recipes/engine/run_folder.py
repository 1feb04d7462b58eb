"""A run's folder: who may write into it, one run at a time, and whether a stopped run can continue there."""

import fcntl
import json
import logging
import os
import shutil
from pathlib import Path
from typing import IO, Any

from dge_recipes.checkpoints import CheckpointStore
from dge_recipes.checkpoints.atomic_files import write_text
from dge_recipes.checkpoints.store import CHECKPOINTS, find_checkpoint
from dge_recipes.config import Config, dump_config, load_config
from dge_recipes.data.images import UNREADABLE_FILE
from dge_recipes.engine.non_finite import BAD_BATCHES
from dge_recipes.errors import MachineError, UserError

__all__ = ["CONFIG_FILE", "CURVE_FILE", "LOCK_FILE", "METRICS_FILE", "SUMMARY_FILE"]
__all__ += [
    "check_still_there",
    "claim_run_folder",
    "find_resume_point",
    "lock_folder",
    "rewind_metrics",
    "unlock_folder",
]

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
CURVE_FILE = "curve.png"
LOCK_FILE = ".lock"

_LOG = logging.getLogger(__name__)
_HELD: dict[Path, IO[bytes]] = {}

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
    "data.max_unreadable",
    "data.classes",
    "data.changed",
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
    for name in (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, CURVE_FILE, UNREADABLE_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, "tensorboard", BAD_BATCHES):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)


def _check_same_run(config: Config, checkpoint: Path) -> None:
    recorded = checkpoint.parent.parent / CONFIG_FILE
    if not recorded.is_file():
        return
    before, now = _flat(load_config(str(recorded))), _flat(config)
    free = _free_keys(config)
    changed = [
        key
        for key in sorted(before | now)
        if before.get(key) != now.get(key) and key not in free and key.split(".")[0] not in _FREE
    ]
    if changed:
        shown = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:3])
        raise UserError(f"cannot continue {checkpoint}: {shown}; expected the same configuration")


def _free_keys(config: Config) -> set[str]:
    # An evaluation that shifts the routers has a part in what is learnt after it.
    return _FREE_KEYS - {"train.eval_every"} if config.budget.kind == "set" else _FREE_KEYS


def _flat(config: Config) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, keys in config.model_dump(mode="json").items():
        flat.update(
            {f"{section}.{key}": value for key, value in keys.items()} if isinstance(keys, dict) else {section: keys}
        )
    return flat


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # the line that was being written when the run was killed
        return None
    return record if isinstance(record, dict) else None


def lock_folder(folder: Path) -> None:
    """Keep other processes from locking a folder until :func:`unlock_folder`, or until this process ends somehow.

    A second start of the same job would mix both runs' checkpoints. This is a POSIX record lock: data loading processes
    do not inherit it, so a killed run leaves nothing behind; machines that share a folder over NFS see each other's.

    Args:
        folder: that exists.

    Raises:
        UserError: another process has locked it.
        OSError: nothing can be written there.
    """
    unlock_folder(folder)
    path = folder / LOCK_FILE
    file = path.open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(path, file):  # its holder has just let go of it
            raise BlockingIOError
    except (BlockingIOError, PermissionError) as error:  # POSIX allows either
        file.close()
        raise UserError(
            f"output folder {folder}: another run is writing there; wait for its end, stop it, or choose another "
            "(output.dir=...)"
        ) from error
    except OSError as error:
        _LOG.warning("%s cannot be locked (%s): see to it that no other run writes there", folder, error.strerror)
    _HELD[folder.resolve()] = file


def unlock_folder(folder: Path) -> None:
    """Let others lock a folder; nothing happens to one that this process has not locked."""
    file = _HELD.pop(folder.resolve(), None)
    if file is not None:
        try:
            (folder / LOCK_FILE).unlink(missing_ok=True)
        finally:
            file.close()


def check_still_there(folder: Path) -> None:
    """Below a mount that is gone lies another disk, on which a locked folder would be begun anew.

    Raises:
        MachineError: it is gone, or is on another file system than when it was locked.
    """
    file = _HELD.get(folder.resolve())
    if file is not None and not (folder.is_dir() and folder.stat().st_dev == os.fstat(file.fileno()).st_dev):
        raise MachineError(
            f"output folder {folder} is not where it was: was it moved, or a mount lost? put it back to go on"
        )


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether an open file is still the one at its path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
