"""The checkpoints folder of a run: the newest few, the best, which can be trusted, and which one a user means."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from dge_recipes.checkpoints.atomic_files import MANIFEST, damage, remove_folder, write_folder, write_text
from dge_recipes.errors import UserError

__all__ = ["CHECKPOINTS", "EMA_FILE", "MODEL_FILE", "CheckpointStore"]
__all__ += ["find_checkpoint", "run_config", "weights_file"]

CHECKPOINTS = "checkpoints"
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{8,})")
_BEST = "best.json"


class CheckpointStore:
    """Checkpoints ``step_XXXXXXXX`` in one folder; ``best.json`` names the best of them.

    Args:
        root: the folder; made when something is saved.
        keep_last: newest checkpoints to keep. The best is kept beside them.
    """

    def __init__(self, root: Path, keep_last: int = 2) -> None:
        self.root, self.keep_last = root, keep_last

    def folders(self) -> list[Path]:
        """Every checkpoint, oldest first, whatever state it is in."""
        if not self.root.is_dir():
            return []
        found = [path for path in self.root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name[len("step_") :]))

    def save(self, step: int, fill: Callable[[Path], None], best_score: float | None = None) -> Path:
        """Write one checkpoint and delete those that are no longer wanted.

        Args:
            step: optimiser steps done.
            fill: writes the files into the folder it is given.
            best_score: this checkpoint's score if it is the best so far, else None.

        Returns:
            The checkpoint's folder.

        Raises:
            UserError: it cannot be written; the checkpoints before it are intact.
        """
        folder = self.root / f"step_{step:08d}"
        write_folder(folder, fill)
        if best_score is not None:
            write_text(self.root / _BEST, json.dumps({"checkpoint": folder.name, "score": best_score}))
        self._clean()
        return folder

    def best(self) -> Path | None:
        """The best checkpoint's folder, or None if no score was ever recorded."""
        try:
            name = json.loads((self.root / _BEST).read_text(encoding="utf-8"))["checkpoint"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.root / _BEST} is damaged: {error}") from error
        return self.root / str(name)

    def newest_intact(self) -> Path | None:
        """The newest checkpoint whose every byte is as written; damaged newer ones are named in a warning."""
        for folder in reversed(self.folders()):
            reason = damage(folder)
            if reason is None:
                return folder
            _LOG.warning("checkpoint %s is damaged (%s): using the one before it", folder, reason)
        return None

    def _clean(self) -> None:
        keep = {path.name for path in self.folders()[-self.keep_last :]}
        best = self.best()
        for folder in self.folders():
            if folder.name not in keep and folder != best:
                remove_folder(folder)
        for leftover in self.root.glob(".*ing-step_*"):  # of a run that was killed while it wrote or deleted
            shutil.rmtree(leftover, ignore_errors=True)


def find_checkpoint(source: str | Path, *, best: bool = False) -> Path:
    """The checkpoint folder that a path means.

    Args:
        source: a run folder or a checkpoint folder.
        best: from a run folder take the best checkpoint instead of the newest intact one.

    Raises:
        UserError: nothing there, or a damaged checkpoint.
    """
    path = Path(source)
    if (path / CHECKPOINTS).is_dir():
        store = CheckpointStore(path / CHECKPOINTS)
        found = store.best() if best else store.newest_intact()
        if found is None:
            raise UserError(f"run folder {path} holds no {'best' if best else 'intact'} checkpoint")
        if not best:
            return found
        path = found
    elif not (path / MANIFEST).is_file():
        what = "is neither a run folder nor a checkpoint folder" if path.exists() else "does not exist"
        raise UserError(f"checkpoint {path} {what}; expected a folder with {CHECKPOINTS}/ or with {MANIFEST}")
    reason = damage(path)
    if reason is not None:
        raise UserError(f"checkpoint {path} is damaged: {reason}")
    return path


def weights_file(source: str | Path, *, best: bool = False, ema: bool = False) -> tuple[Path, bool]:
    """The file that holds a model's weights. Of a checkpoint all files are verified, so call it once.

    Args:
        source: a run folder, a checkpoint folder or a weights file.
        best: from a run folder take the best checkpoint instead of the newest.
        ema: the averaged weights.

    Returns:
        The file, and whether averaged weights must be picked inside it (files of other projects).

    Raises:
        UserError: nothing there, a damaged checkpoint, or averaged weights that were never kept.
    """
    path = Path(source)
    if path.is_file():
        if best:
            raise UserError(f"checkpoint {path} is one file; --best expects a run folder, to choose from")
        return path, ema
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist; expected a run, a checkpoint folder or a weights file")
    folder = find_checkpoint(path, best=best)
    file = folder / (EMA_FILE if ema else MODEL_FILE)
    if not file.is_file():
        raise UserError(f"checkpoint {folder} holds no averaged weights (train.ema_decay was null)")
    return file, False


def run_config(source: str | Path) -> Path | None:
    """The recorded config of the run that a path belongs to, or None for a bare file."""
    path = Path(source)
    for folder in (path, *list(path.parents)[:3]):
        if (folder / "config.yaml").is_file() and (folder / CHECKPOINTS).is_dir():
            return folder / "config.yaml"
    return None
