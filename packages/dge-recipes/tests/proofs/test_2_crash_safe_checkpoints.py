"""A full disk ends a run with one clear error, and what was saved before is whole.

What a crash leaves behind, damaged and half-written checkpoints, is proved in ``checkpoints/``.
"""

import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dge_recipes.checkpoints import CheckpointStore
from dge_recipes.config import Config
from dge_recipes.errors import UserError
from dge_recipes.train import train


@contextmanager
def limited_files() -> Iterator[None]:
    """No file of this process may exceed 100 kB, less than the weights take: writing it fails in the middle.

    Inside ``with``, and no fixture: the file that the tests' own output goes to may be longer.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails(small_config: Callable[..., Config]) -> None:
    words = r"cannot write .*step_00000005: File too large; what was saved before is intact"
    with pytest.raises(UserError, match=words), limited_files():
        train(small_config("model.kwargs.embed_dim=64"))
    assert list((Path(small_config().output.dir) / "checkpoints").iterdir()) == []


def test_old_checkpoints_survive_a_write_that_fails(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_config("model.kwargs.embed_dim=64", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dge_recipes.train._finish_epoch", _interrupt)
        train(base)
    store = CheckpointStore(Path(base.output.dir) / "checkpoints")
    assert [folder.name for folder in store.folders()] == ["step_00000002", "step_00000004"]
    with pytest.raises(UserError, match="what was saved before is intact"), limited_files():
        train(base, resume="auto")
    assert [folder.name for folder in store.folders()] == ["step_00000002", "step_00000004"]
    assert store.newest_intact() == store.folders()[-1]
    assert sorted(path.name for path in store.root.iterdir()) == ["step_00000002", "step_00000004"]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here; the tests with a limit on files stand for this one")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_config: Callable[..., Config], small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(1_300_000))
    config = small_config(f"output.dir={small_disk / 'run'}", "model.kwargs.embed_dim=48", "checkpoint.every_steps=1")
    with pytest.raises(UserError, match=r"cannot write .*: the disk is full; what was saved before is intact"):
        train(config)
    store = CheckpointStore(small_disk / "run" / "checkpoints")
    assert store.newest_intact() == store.folders()[-1]
    (small_disk / "ballast").unlink()
    assert train(config, resume="auto")["steps"] == 10
