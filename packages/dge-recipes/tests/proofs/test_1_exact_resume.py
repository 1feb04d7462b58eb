"""A run that is stopped and resumed is, bit for bit, the run that was never stopped."""

import itertools
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from dge_recipes.config import Config, load_config
from dge_recipes.engine.reporting import Reporter
from dge_recipes.errors import RunStopped
from dge_recipes.evaluation import accuracy
from dge_recipes.train import train

TRAIN = ("-m", "dge_recipes.train", "--config", "digits")
TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint")
EVERY = 3  # steps between two checkpoints


def _signal_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Reporter.step

    def signalled(reporter: Reporter) -> None:
        original(reporter)
        if reporter._progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Reporter, "step", signalled)


# Steps 1 to 10 in two epochs of 5; 5 and 10 are followed by an evaluation, which must not be lost; 6 is saved anyway.
@pytest.mark.parametrize("step", [2, 5, 6, 8, 10])
def test_sigterm_at_any_step(
    small_config: Callable[..., Config],
    stateful: Sequence[str],
    whole: Path,
    assert_equal_runs: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    config = small_config(*stateful, output="stopped")
    with monkeypatch.context() as patch, pytest.raises(RunStopped, match=f"stopped by SIGTERM at step {step} of 10"):
        _signal_at(step, patch)
        train(config)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert (Path(config.output.dir) / "checkpoints" / f"step_{step:08d}").is_dir()
    train(config, resume="auto")
    assert_equal_runs(whole, Path(config.output.dir))


@pytest.mark.parametrize("batch", [1, 2, 8], ids="batch {}".format)  # 4 for the network, then 4 for its average
def test_sigterm_during_an_evaluation(
    small_config: Callable[..., Config],
    stateful: Sequence[str],
    whole: Path,
    assert_equal_runs: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
) -> None:
    config = small_config(*stateful, output="stopped")
    with monkeypatch.context() as patch, pytest.raises(RunStopped, match="stopped by SIGTERM at step 5 of 10"):
        classify, calls = accuracy._classify, itertools.count(1)

        def signalled(*arguments: Any) -> Any:
            if next(calls) == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            return classify(*arguments)

        patch.setattr(accuracy, "_classify", signalled)
        train(config)
    train(config, resume="auto")
    assert_equal_runs(whole, Path(config.output.dir))


def test_a_log_interval_cut_by_a_stop_is_logged_whole(
    small_config: Callable[..., Config], assert_equal_runs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = (small_config("train.log_every=4", output=name) for name in ("one", "two"))
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        _signal_at(3, patch)
        train(stopped)
    train(stopped, resume="auto")
    assert_equal_runs(Path(whole.output.dir), Path(stopped.output.dir))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small: Sequence[str], stateful: Sequence[str]) -> Path:
    """A run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(load_config("digits", [*small, *stateful, f"output.dir={folder}"]))
    return folder


@pytest.fixture(scope="module")
def long(small: Sequence[str], stateful: Sequence[str]) -> tuple[str, ...]:
    """The same for 12 epochs: long enough to be met in the middle."""
    return (*small, *stateful, "train.epochs=12", "train.eval_every=6", "data.workers=1")


@pytest.fixture(scope="module")
def long_whole(tmp_path_factory: pytest.TempPathFactory, long: Sequence[str]) -> Path:
    folder = tmp_path_factory.mktemp("long") / "run"
    train(load_config("digits", [*long, "data.workers=0", f"output.dir={folder}"]))
    return folder


def test_sigterm_to_all_of_a_job_saves_and_ends_with_status_0(
    start: Callable[..., "subprocess.Popen[str]"],
    long: Sequence[str],
    long_whole: Path,
    wait_for_step: Callable[..., int],
    assert_equal_runs: Callable[..., None],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    process = start(*TRAIN, *long, f"output.dir={run}")
    wait_for_step(run, 7, process)
    os.killpg(process.pid, signal.SIGTERM)  # the data loading process gets it too, as under a cluster's scheduler
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "dge-train: stopped by SIGTERM at step" in err
    assert "--resume auto" in err
    assert "Traceback" not in err
    assert not (run / "summary.json").exists()
    train(load_config("digits", [*long, "data.workers=0", f"output.dir={run}"]), resume="auto")
    assert_equal_runs(long_whole, run)


def test_sigkill_loses_no_more_than_the_steps_since_the_last_checkpoint(
    start: Callable[..., "subprocess.Popen[str]"],
    long: Sequence[str],
    long_whole: Path,
    wait_for_step: Callable[..., int],
    assert_equal_runs: Callable[..., None],
    tmp_path: Path,
) -> None:
    run, moment = tmp_path / "run", random.Random()
    process = start(*TRAIN, *long, f"output.dir={run}")
    wait_for_step(run, moment.randint(4, 40), process)
    time.sleep(moment.uniform(0, 0.1))  # anywhere in a step, or while a checkpoint is being written
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    logged = wait_for_step(run, 1, process)
    from dge_recipes.checkpoints import CheckpointStore

    newest = CheckpointStore(run / "checkpoints").newest_intact()
    assert newest is not None
    # The step that was under way may have been logged and its checkpoint not yet renamed.
    assert logged - int(newest.name[len("step_") :]) <= EVERY
    train(load_config("digits", [*long, "data.workers=0", f"output.dir={run}"]), resume="auto")
    assert_equal_runs(long_whole, run)


def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(
    start: Callable[..., "subprocess.Popen[str]"],
    command: Callable[..., Any],
    small: Sequence[str],
    stateful: Sequence[str],
    wait_for_step: Callable[..., int],
    assert_equal_runs: Callable[..., None],
    tmp_path: Path,
) -> None:
    launch = [*TWO, "localhost:0", *TRAIN, *small, *stateful, "train.batch_size=40", "train.epochs=6"]
    runs = [tmp_path / name for name in ("stopped", "whole")]
    process = start(*launch, f"output.dir={runs[0]}")
    wait_for_step(runs[0], 4, process)
    os.kill(_worker(process.pid, rank=1), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err.count("stopped by SIGTERM at step") == 1
    for run, options in ((runs[0], ("--resume", "auto")), (runs[1], ())):
        result = command(*launch, f"output.dir={run}", *options)
        assert result.returncode == 0, result.stderr
    assert_equal_runs(runs[1], runs[0])


def _worker(launcher: int, rank: int) -> int:
    """The process of a rank below a launcher."""
    for child in psutil.Process(launcher).children():
        if child.environ().get("RANK") == str(rank):
            return int(child.pid)
    raise AssertionError(f"rank {rank} was not started")
