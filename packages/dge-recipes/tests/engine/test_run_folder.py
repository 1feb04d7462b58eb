"""Who may write into a run's folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dge_recipes.checkpoints import CheckpointStore
from dge_recipes.config import Config, load_config
from dge_recipes.engine.run_folder import claim_run_folder, find_resume_point, rewind_metrics, unlock_folder
from dge_recipes.errors import UserError


def _write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"w")


def _open(config: Config, resume: str | None = None, overwrite: bool = False) -> str | None:
    checkpoint = find_resume_point(config, resume, overwrite)
    claim_run_folder(config, resume, checkpoint)
    unlock_folder(Path(config.output.dir))
    return checkpoint


def _used(config: Config) -> Path:
    """A folder in which a run has left a checkpoint, metrics and something of the user's."""
    _open(config)
    folder = Path(config.output.dir)
    CheckpointStore(folder / "checkpoints").save(3, _write)
    (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    return folder


def test_a_new_folder_records_the_config(small_config: Callable[..., Config]) -> None:
    config = small_config()
    assert _open(config) is None
    assert load_config(str(Path(config.output.dir) / "config.yaml")) == config


def test_existing_output_is_not_touched_unless_asked(small_config: Callable[..., Config]) -> None:
    config = small_config()
    folder = _used(config)
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(UserError, match=r"is not empty: choose another .* --resume auto, .* --overwrite"):
        _open(config)
    assert sorted(path.name for path in folder.rglob("*")) == before
    _open(config, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "notes.txt"]


def test_resume_auto_continues_or_starts(small_config: Callable[..., Config]) -> None:
    config = small_config()
    assert _open(config, resume="auto") is None
    folder = _used(small_config(output="other"))
    assert _open(small_config(output="other"), resume="auto") == str(folder / "checkpoints" / "step_00000003")
    assert (folder / "metrics.jsonl").is_file()


def test_resuming_from_another_runs_checkpoint_needs_a_folder_of_its_own(
    small_config: Callable[..., Config],
) -> None:
    source = _used(small_config(output="source"))
    taken = _used(small_config(output="taken"))
    assert _open(small_config(output="fresh"), resume=str(source)) is not None
    with pytest.raises(UserError, match="is not empty"):
        _open(small_config(output="taken"), resume=str(source))
    assert (taken / "metrics.jsonl").is_file()


@pytest.mark.parametrize(
    ("override", "words"),
    [("optim.lr=5e-3", r"optim\.lr was 0\.01 and is 0\.005"), ("data.shift=1", r"data\.shift was 3\.0 and is 1\.0")],
)
def test_another_configuration_cannot_continue(small_config: Callable[..., Config], override: str, words: str) -> None:
    _used(small_config())
    with pytest.raises(UserError, match=words):
        _open(small_config(override), resume="auto")


def test_what_does_not_change_the_result_may_change(small_config: Callable[..., Config]) -> None:
    _used(small_config())
    assert _open(small_config("train.log_every=7", "data.workers=3", "checkpoint.keep_last=9"), resume="auto")
    assert _open(small_config("data.changed=accept", "data.classes=subset"), resume="auto")


@pytest.mark.parametrize(("resume", "words"), [("nowhere", "does not exist"), (".", "is neither a run folder nor")])
def test_a_resume_path_without_a_checkpoint(
    small_config: Callable[..., Config], tmp_path: Path, resume: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        _open(small_config(), resume=str(tmp_path / resume))


def test_output_below_a_file(small_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output folder .*file/run cannot be written"):
        _open(small_config(output="file/run"))


def test_output_that_is_a_file(small_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file; expected a folder"):
        _open(small_config())


def test_metrics_are_rewound_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) for step in (2, 4, 6)]
    path.write_text("\n".join(lines) + '\n{"kind": "tra', encoding="utf-8")
    rewind_metrics(path, 4)
    assert path.read_text(encoding="utf-8").splitlines() == lines[:2]
    rewind_metrics(tmp_path / "absent.jsonl", 4)
