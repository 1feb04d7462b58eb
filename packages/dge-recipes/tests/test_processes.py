"""One, two and three processes on the CPU, under accelerate launch and under torchrun.

Each launch is a process tree of its own; what matters is how many processes really took part, which the
run's own records say.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from dge_recipes.config import launcher_path, load_config
from dge_recipes.errors import UserError
from dge_recipes.processes import on_main_process, start_processes

LAUNCHES = [(launcher, count) for launcher in ("accelerate", "torchrun") for count in (1, 2, 3)]


def _launch(launcher: str, count: int) -> list[str]:
    if launcher == "torchrun":
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]  # any free port
        return ["-m", "torch.distributed.run", "--nproc_per_node", str(count), *meeting, "-m"]
    config = str(launcher_path("cpu"))
    return ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(count), "-m"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any], small: Sequence[str]) -> Path:
    """One small run, by one process and no launcher."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    result = command("-m", "dge_recipes.train", "--config", "digits", *small, f"output.dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(("launcher", "count"), LAUNCHES)
def test_training(command: Callable[..., Any], small: Sequence[str], tmp_path: Path, launcher: str, count: int) -> None:
    folder = tmp_path / "run"
    result = command(
        *_launch(launcher, count), "dge_recipes.train", "--config", "digits", *small, f"output.dir={folder}"
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert (summary["num_processes"], summary["images"], summary["device"]) == (count, 360, "cpu")
    # 1437 images in steps of 240 per process.
    assert summary["steps"] == 2 * (1437 // (240 * count))
    assert result.stdout.count("| model |") == 1


# Training above has evaluated under all six launches; these compare with one process on the same weights.
@pytest.mark.parametrize(("launcher", "count"), [("accelerate", 3), ("torchrun", 2)])
def test_evaluation(command: Callable[..., Any], trained: Path, tmp_path: Path, launcher: str, count: int) -> None:
    report = tmp_path / "report.json"
    result = command(*_launch(launcher, count), "dge_recipes.evaluate", str(trained), "--json", str(report))
    assert result.returncode == 0, result.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    expected = json.loads((trained / "summary.json").read_text(encoding="utf-8"))
    assert (found["num_processes"], found["images"]) == (count, 360)
    assert (found["acc1"], found["acc5"]) == (expected["acc1"], expected["acc5"])
    assert found["macs"] == pytest.approx(expected["macs"], rel=1e-9)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_two_processes_resume_exactly(command: Callable[..., Any], small: Sequence[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "run"
    arguments = [*_launch("torchrun", 2), "dge_recipes.train", "--config", "digits", *small, f"output.dir={folder}"]
    arguments += ["train.batch_size=120", "checkpoint.every_steps=3", "checkpoint.keep_last=99"]
    assert command(*arguments).returncode == 0
    last = folder / "checkpoints" / "step_00000010"
    names = ("model.safetensors", "optimizer.safetensors")
    before = {name: load_file(last / name) for name in names}
    for step in (5, 6, 9, 10):  # as if the run had been killed after step 3, in the middle of an epoch
        (folder / "checkpoints" / f"step_{step:08d}").rename(tmp_path / str(step))
    result = command(*arguments, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    for name in names:
        after = load_file(last / name)
        assert all(after[key].equal(value) for key, value in before[name].items())


def test_a_users_mistake_ends_all_processes(command: Callable[..., Any], small: Sequence[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    arguments = ["dge_recipes.train", "--config", "digits", *small, f"output.dir={tmp_path}"]
    result = command(*_launch("torchrun", 2), *arguments)
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
