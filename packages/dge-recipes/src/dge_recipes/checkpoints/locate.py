"""From what a user calls a checkpoint to the file that holds the weights."""

from pathlib import Path

from dge_recipes.checkpoints.folder import MANIFEST, damage
from dge_recipes.checkpoints.store import CheckpointStore
from dge_recipes.errors import UserError

__all__ = ["CHECKPOINTS", "EMA_FILE", "MODEL_FILE", "find_checkpoint", "run_config", "weights_file"]

CHECKPOINTS = "checkpoints"
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"


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
        path = found
    elif not (path / MANIFEST).is_file():
        what = "is neither a run folder nor a checkpoint folder" if path.exists() else "does not exist"
        raise UserError(f"checkpoint {path} {what}; expected a folder with {CHECKPOINTS}/ or with {MANIFEST}")
    reason = damage(path)
    if reason is not None:
        raise UserError(f"checkpoint {path} is damaged: {reason}")
    return path


def weights_file(source: str | Path, *, best: bool = False, ema: bool = False) -> tuple[Path, bool]:
    """The file that holds a model's weights.

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
