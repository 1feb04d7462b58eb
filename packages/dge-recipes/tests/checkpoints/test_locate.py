"""From what a user calls a checkpoint to the weights."""

from pathlib import Path

import pytest

from dge_recipes.checkpoints import CheckpointStore, run_config, weights_file
from dge_recipes.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    store = CheckpointStore(folder / "checkpoints")
    for step, score in ((1, 9.0), (2, None)):
        store.save(step, lambda path: (path / "model.safetensors").write_bytes(b"w") and None, score)
    (folder / "config.yaml").touch()
    return folder


def test_run_checkpoint_and_file(run: Path) -> None:
    newest, oldest = run / "checkpoints" / "step_00000002", run / "checkpoints" / "step_00000001"
    assert weights_file(run) == (newest / "model.safetensors", False)
    assert weights_file(run, best=True) == (oldest / "model.safetensors", False)
    assert weights_file(oldest) == (oldest / "model.safetensors", False)
    assert weights_file(oldest / "model.safetensors") == (oldest / "model.safetensors", False)
    # In a file of another project the averaged weights are inside.
    assert weights_file(oldest / "model.safetensors", ema=True) == (oldest / "model.safetensors", True)


def test_the_config_of_the_run_is_found_from_inside(run: Path, tmp_path: Path) -> None:
    for place in (run, run / "checkpoints", run / "checkpoints" / "step_00000001" / "model.safetensors"):
        assert run_config(place) == run / "config.yaml"
    assert run_config(tmp_path / "other.pth") is None


def test_what_is_not_there(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, words in ((tmp_path / "gone", "gone does not exist"), (tmp_path / "empty", "empty is neither a run")):
        with pytest.raises(UserError, match=words):
            weights_file(source)
    with pytest.raises(UserError, match="no averaged weights"):
        weights_file(run, ema=True)
    with pytest.raises(UserError, match="is one file; --best expects a run folder"):
        weights_file(run / "checkpoints" / "step_00000002" / "model.safetensors", best=True)
    (run / "checkpoints" / "best.json").unlink()
    with pytest.raises(UserError, match="no best checkpoint"):
        weights_file(run, best=True)


def test_a_damaged_checkpoint_named_by_its_path(run: Path) -> None:
    folder = run / "checkpoints" / "step_00000002"
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"is damaged: model.safetensors has 0 bytes"):
        weights_file(folder)
    assert weights_file(run)[0].parent.name == "step_00000001"
