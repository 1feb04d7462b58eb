"""What the tests share: small settings, a clean Accelerate, and commands in processes of their own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from small_recipes import SMALL, forget_accelerate

from dge_recipes.config import Config, load_config

torch.set_num_threads(1)

Start = Callable[..., "subprocess.Popen[str]"]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def small() -> Sequence[str]:
    """Overrides that make the digits recipes small."""
    return SMALL


@pytest.fixture(scope="session")
def stateful() -> tuple[str, ...]:
    """EMA, accumulation, mixing, warm-up, clipping and Gumbel noise in one run of 10 steps in two epochs."""
    return (
        "train.ema_decay=0.9",
        "train.batch_size=80",
        "train.accumulation_steps=3",
        "mixing.mixup=0.4",
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=99",
        "train.log_every=1",
    )


@pytest.fixture
def small_config(tmp_path: Path) -> Callable[..., Config]:
    """Build a small config of a shipped recipe, its output below the test's folder."""

    def build(*overrides: str, name: str = "digits", output: str = "run") -> Config:
        return load_config(name, [*SMALL, f"output.dir={tmp_path / output}", *overrides])

    return build


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[Callable[[], None]]:
    """Accelerate keeps its state in singletons; a test must not see an earlier one's. Call it to forget at once."""
    yield forget_accelerate
    forget_accelerate()


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of commands in processes of their own: one thread, and bytecode that stays out of the source tree."""
    cache = tmp_path_factory.mktemp("bytecode")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # Warm bytecode saves seconds per process; it must not land in the source tree.
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(cache)}


@pytest.fixture(scope="session")
def command(environment: dict[str, str]) -> Command:
    """Run ``python ARGUMENTS`` in a process of its own, on one thread, and return what it said."""

    def run(*arguments: str, cwd: Path | None = None, timeout: float = 240) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def heeded_signals() -> Iterator[None]:
    """Heed Ctrl-C and a hang-up even where the tests' own process ignores them, as under nohup or in a script's &."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """Start ``python ARGUMENTS`` in a process group of its own; whatever is left of it ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
