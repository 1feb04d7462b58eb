"""What the proofs share: a run with everything that has state, and comparisons of what runs leave."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

CLOCK = {"images_per_second", "data_share", "memory_mib"}
STATE = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="session")
def assert_equal_runs() -> Callable[[Path, Path], None]:
    """Fail unless two runs' last checkpoints and metrics are equal, bit for bit."""

    def check(first: Path, second: Path) -> None:
        last = [sorted((run / "checkpoints").glob("step_*"))[-1] for run in (first, second)]
        assert last[0].name == last[1].name
        for name in STATE:
            if not (last[0] / name).exists():
                continue
            one, two = (load_file(folder / name) for folder in last)
            assert one.keys() == two.keys()
            assert [key for key in one if not one[key].equal(two[key])] == []
        assert records(first) == records(second)

    return check


def records(run: Path) -> list[dict[str, Any]]:
    """What a run logged, without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


@pytest.fixture(scope="session")
def wait_for_step() -> Callable[..., int]:
    """Wait until a run has logged a step; returns the last step that it has logged."""

    def wait(run: Path, step: int, process: Any, seconds: float = 120) -> int:
        metrics, end = run / "metrics.jsonl", time.monotonic() + seconds
        while time.monotonic() < end:
            found = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
            steps = [json.loads(line)["step"] for line in found if line.endswith("\n")]
            if steps and steps[-1] >= step:
                return int(steps[-1])
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"step {step} was not reached in {seconds} s")

    return wait
