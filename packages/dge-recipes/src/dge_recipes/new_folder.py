"""A folder of results that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dge_recipes.errors import UserError

__all__ = ["check_new_folder", "new_folder"]


def check_new_folder(folder: Path) -> None:
    """Tell at once that a folder is taken.

    Raises:
        UserError: it is there, with something in it, or it is a file.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--output {folder} exists; expected the name of a new folder, or of an empty one")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Inside ``with``, a folder aside to write into; afterwards it is renamed. An error leaves nothing behind.

    Args:
        folder: new or empty.

    Raises:
        UserError: it is taken, or cannot be written.
    """
    check_new_folder(folder)
    above = folder.absolute().parent
    try:
        above.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=above))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    try:
        made = aside / "made"
        made.mkdir()
        yield made
        for file in made.iterdir():
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        made.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
