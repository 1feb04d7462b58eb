"""The checkpoints folder of a run."""

import logging
from pathlib import Path

import pytest

from dge_recipes.checkpoints import CheckpointStore
from dge_recipes.errors import UserError


def _write(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"weights")


def _names(store: CheckpointStore) -> list[str]:
    return [path.name for path in store.folders()]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    assert (store.folders(), store.best(), store.newest_intact()) == ([], None, None)
    for step, score in ((10, 50.0), (20, 90.0), (30, None), (40, None), (50, None)):
        store.save(step, _write, score)
    assert _names(store) == ["step_00000020", "step_00000040", "step_00000050"]
    assert store.best() == store.root / "step_00000020"
    store.save(60, _write, 91.0)
    assert _names(store) == ["step_00000050", "step_00000060"]
    assert store.best() == store.newest_intact() == store.root / "step_00000060"


def test_order_is_by_number(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (99_999_999, 100_000_000):
        store.save(step, _write)
    assert _names(store) == ["step_99999999", "step_100000000"]


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        store.save(step, _write)
    (tmp_path / "step_00000003" / "model.bin").write_bytes(b"weight")
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert store.newest_intact() == tmp_path / "step_00000001"
    assert [record.getMessage().count("is damaged") for record in caplog.records] == [1, 1]
    assert "model.bin has 6 bytes, expected 7" in caplog.text


def test_leftovers_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for name in (".writing-step_00000009", ".deleting-step_00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    assert store.folders() == []
    store.save(10, _write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010"]


def test_a_damaged_record_of_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, _write, 1.0)
    (tmp_path / "best.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"best\.json is damaged"):
        store.best()
