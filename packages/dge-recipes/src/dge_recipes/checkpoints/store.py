"""The checkpoints folder of a run: the newest few, the best, and which of them can be trusted."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from dge_recipes.checkpoints.folder import damage, remove_folder, write_folder, write_text
from dge_recipes.errors import UserError

__all__ = ["CheckpointStore"]

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
