"""One, two and three processes on the CPU, under accelerate launch and under torchrun.

Each launch is a process tree of its own; what matters is how many processes really took part, which the
run's own records say.
"""

import errno
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from launching import launch

from dge_recipes import processes
from dge_recipes.config import load_config
from dge_recipes.errors import MachineError, UserError
from dge_recipes.processes import on_every_process, on_main_process, start_processes

LAUNCHES = [(launcher, count) for launcher in ("accelerate", "torchrun") for count in (1, 2, 3)]


@pytest.mark.parametrize(("launcher", "count"), LAUNCHES)
def test_training(command: Callable[..., Any], small: Sequence[str], tmp_path: Path, launcher: str, count: int) -> None:
    folder = tmp_path / "run"
    result = command(
        *launch(launcher, count), "dge_recipes.train", "--config", "digits", *small, f"output.dir={folder}"
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert (summary["num_processes"], summary["images"], summary["device"]) == (count, 360, "cpu")
    # 1437 images in steps of 240 per process.
    assert summary["steps"] == 2 * (1437 // (240 * count))
    assert result.stdout.count("| model |") == 1


def test_a_users_mistake_ends_all_processes(command: Callable[..., Any], small: Sequence[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    arguments = ["dge_recipes.train", "--config", "digits", *small, f"output.dir={tmp_path}"]
    result = command(*launch("torchrun", 2), *arguments)
    assert result.returncode != 0
    assert result.stderr.count("is not empty: choose another") == 2
    assert "(process 1)" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_launch_that_starts_fewer_processes_is_noticed(
    monkeypatch: pytest.MonkeyPatch, small: Sequence[str], tmp_path: Path
) -> None:
    config = load_config("digits", [*small, f"output.dir={tmp_path}"])
    accelerator = start_processes(config)
    assert accelerator.num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched but 1 take part"):
        start_processes(config)


def test_the_main_process_answers_or_fails_for_all() -> None:
    accelerator = Accelerator(cpu=True)
    assert on_main_process(accelerator, lambda: 3) == 3

    def fail() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        on_main_process(accelerator, fail)


def test_what_the_machine_does_to_the_main_process_is_told_by_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared: list[Any] = []
    monkeypatch.setattr("dge_recipes.processes.broadcast_object_list", shared.extend)

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    with pytest.raises(MachineError, match="No space left on device: x; free some space") as caught:
        on_main_process(Accelerator(cpu=True), fail)
    assert isinstance(caught.value.__cause__, OSError)
    others = pickle.loads(pickle.dumps(shared))[1]
    assert (type(others), str(others)) == (MachineError, str(caught.value))


def test_sharding_is_refused_and_not_silently_left_out(
    monkeypatch: pytest.MonkeyPatch, small: Sequence[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP is not supported here: launch with DDP"):
        start_processes(load_config("digits", [*small, f"output.dir={tmp_path}"]))


def test_an_error_in_one_process_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UserError("no such folder")

    accelerator = Accelerator(cpu=True)
    assert on_every_process(accelerator, lambda: 3) == 3
    with pytest.raises(UserError, match=r"^no such folder$"):
        on_every_process(accelerator, fail)
    monkeypatch.setattr(processes, "gather_object", lambda own: [*own, "no such folder"])
    with pytest.raises(UserError, match=r"^process 1: no such folder$"):
        on_every_process(accelerator, lambda: 3)
