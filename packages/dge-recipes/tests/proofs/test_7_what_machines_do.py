"""What a machine does to a run ends it in seconds with one line, and ``--resume auto`` goes on as if nothing had been.

Each fault is the real one: a killed process, a disk that is full or gone, a limit of the operating system.
"""

import errno
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from launching import launch

from dge_recipes.config import Config, load_config
from dge_recipes.engine.reporting import Reporter
from dge_recipes.errors import MachineError
from dge_recipes.evaluation import accuracy
from dge_recipes.train import main, train

STEP = 4  # of 10, in two epochs; checkpoints after 3, 5, 6, 9 and 10
AGAIN = "; then continue with --resume auto"
KILLED = (
    r"data loading process \d+ was killed \(SIGKILL\), as the system does when memory runs out; "
    "fewer data.workers or smaller batches may help"
)
PEER = "another process of this run has ended or does not answer; its own message, if it left one, says why"


@pytest.fixture(scope="module")
def options(small: Sequence[str], stateful: Sequence[str]) -> tuple[str, ...]:
    """Overrides of every run here."""
    return (*small, *stateful)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, options: Sequence[str]) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(load_config("digits", [*options, f"output.dir={folder}"]))
    return folder


Trial = Callable[..., None]


@pytest.fixture
def trial(
    options: Sequence[str],
    whole: Path,
    assert_equal_runs: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    fresh_accelerate: Callable[[], None],
) -> Trial:
    """Train with a fault, which ends the run; then heal, resume, and compare with the run that nothing happened to."""

    def check(run: Path, heal: Callable[[], object], told: str, *more: str) -> None:
        arguments = ["--config", "digits", "--output", str(run), *options, *more]
        start = time.monotonic()
        assert main(arguments) == 75
        assert time.monotonic() - start < 60
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("epoch ")]
        assert len(said) == 1, said
        assert re.fullmatch(f"dge-train: error: {told}{AGAIN}", said[0])
        heal()
        fresh_accelerate()
        assert main([*arguments, "--resume", "auto"]) == 0
        assert_equal_runs(whole, run)

    return check


def _at_step(monkeypatch: pytest.MonkeyPatch, harm: Callable[[], object], step: int = STEP) -> Callable[[], None]:
    """Do harm after a step; returns what ends that."""
    original = Reporter.step

    def harmed(reporter: Reporter) -> None:
        original(reporter)
        if reporter._progress.step == step:
            harm()

    monkeypatch.setattr(Reporter, "step", harmed)
    return lambda: monkeypatch.setattr(Reporter, "step", original)


def _kill_a_worker() -> None:
    """The one that was started last: children have no order, and earlier tests' loaders may have left some."""
    newest = max(multiprocessing.active_children(), key=lambda child: int(child.name.rpartition("-")[2]))
    os.kill(newest.pid or 0, signal.SIGKILL)


def test_a_killed_worker(trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial(tmp_path / "run", _at_step(monkeypatch, _kill_a_worker), KILLED, "data.workers=2")


def test_a_worker_killed_during_an_evaluation(trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classify = accuracy._classify

    def killing(*arguments: Any) -> Any:
        _kill_a_worker()
        return classify(*arguments)

    monkeypatch.setattr(accuracy, "_classify", killing)
    heal = lambda: monkeypatch.setattr(accuracy, "_classify", classify)  # noqa: E731
    trial(tmp_path / "run", heal, KILLED, "data.workers=1", "eval.batch_size=20")


def _mount(*arguments: str | Path) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(trial: Trial, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ballast = disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            while shutil.disk_usage(disk).free:
                file.write(bytes(4096))

    heal = _at_step(monkeypatch, fill)
    told = (
        r"(cannot write|the trackers cannot write to) .*: (the disk is full|No space left on device); .*free some space"
    )
    trial(disk / "run", lambda: (heal(), ballast.unlink()), told)


def test_a_disk_that_can_only_be_read_any_more(trial: Trial, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = disk / "run"

    def protect() -> None:  # another mount, for the run has a file open for writing, whose own cannot be changed
        subprocess.run(["mount", "--bind", run, run], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", run], check=True)

    heal = _at_step(monkeypatch, protect)
    told = "the trackers cannot write to .*run: Read-only file system; see why it can only be read: mount and dmesg .*"
    trial(run, lambda: (heal(), subprocess.run(["umount", run], check=True)), told)


@pytest.mark.parametrize(
    ("trackers", "what"), [("[tensorboard]", "the trackers cannot write to"), ("[]", "cannot write")]
)
def test_a_lost_mount(trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trackers: str, what: str) -> None:
    real, mount = tmp_path / "real", tmp_path / "mount"
    real.mkdir()
    mount.mkdir()
    _mount("--bind", real, mount)
    heal = _at_step(monkeypatch, lambda: subprocess.run(["umount", "-l", mount], check=True))
    told = f"{what} {mount}/run.*: No such file or directory; it could be written before"
    try:
        trial(mount / "run", lambda: (heal(), _mount("--bind", real, mount)), told, f"output.trackers={trackers}")
    finally:
        subprocess.run(["umount", "-l", mount], capture_output=True, check=False)


def test_nothing_is_written_below_a_lost_mount(
    small_config: Callable[..., Config], options: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, aside = tmp_path / "run", tmp_path / "aside"
    config = small_config(*options, "train.log_every=99")
    heal = _at_step(monkeypatch, lambda: run.rename(aside), step=6)  # next a checkpoint is written, and nothing else
    with pytest.raises(
        MachineError, match=r"^output folder .*run is not where it was: was it moved, or a mount lost\?"
    ):
        train(config)
    assert not run.exists()
    heal()
    aside.rename(run)
    assert train(config, resume="auto")["steps"] == 10


def test_no_more_descriptors(trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit() -> None:
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))

    def heal() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    undo = _at_step(monkeypatch, limit)
    try:
        told = (
            "the trackers cannot write to .*run: Too many open files; a higher ulimit -n or fewer data.workers may help"
        )
        trial(tmp_path / "run", lambda: (undo(), heal()), told)
    finally:
        heal()


def test_no_more_memory(trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heal = _at_step(monkeypatch, lambda: torch.empty(1 << 50))
    told = r"out of memory \(\d+ bytes were asked for\); fewer data.workers or smaller batches \(.*\) need less"
    trial(tmp_path / "run", heal, told)


def test_a_tracker_that_nobody_listens_to(trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TensorBoardTracker.log

    def broken(*arguments: Any, step: int, **options: Any) -> None:
        if step > STEP:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        log(*arguments, step=step, **options)

    monkeypatch.setattr(TensorBoardTracker, "log", broken)
    told = "the trackers cannot write to .*run: Broken pipe; the other side is gone, or the network is"
    trial(tmp_path / "run", lambda: monkeypatch.setattr(TensorBoardTracker, "log", log), told)


# The rest needs processes of its own.


def _said(process: "subprocess.CompletedProcess[str]") -> list[str]:
    return [line for line in process.stderr.splitlines() if line.startswith("dge-")]


def test_no_shared_memory(
    options: Sequence[str], environment: dict[str, str], whole: Path, assert_equal_runs: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dge_recipes.train", "--config", "digits", *options, f"output.dir={run}"]
    own = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=100k tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    ended = subprocess.run(
        [*own, *command, "data.workers=2"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 75, ended.stderr
    assert "Traceback" not in ended.stderr
    (said,) = _said(ended)
    assert "/dev/shm" in said
    assert "a larger one (docker run --shm-size), fewer data.workers or smaller batches" in said
    assert said.endswith(AGAIN)
    train(load_config("digits", [*options, f"output.dir={run}"]), resume="auto")
    assert_equal_runs(whole, run)


def test_no_more_processes(options: Sequence[str], environment: dict[str, str], tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    # Limits on processes do not hold for root: as another user, who may still read and write everything.
    may = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--bounding-set=-sys_admin,-sys_resource"]
    own = ["setpriv", "--reuid", "54321", "--clear-groups", *may, "prlimit", "--nproc=4"]
    if shutil.which("setpriv") is None or subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("limits on processes cannot be set here")
    command = [sys.executable, "-m", "dge_recipes.train", "--config", "digits", *options, "data.workers=8"]
    ended = subprocess.run(
        [*own, *command, f"output.dir={tmp_path / 'run'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 75, ended.stderr
    (said,) = _said(ended)
    told = (
        "no more processes or threads may be started; a higher limit (ulimit -u, the container's) or fewer data.workers"
    )
    assert said == f"dge-train: error: {told} may help{AGAIN}"


_PEER = """
import os, signal, sys
from dge_recipes import train
from dge_recipes.evaluation import accuracy
from dge_recipes.engine.reporting import Reporter

def die():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

where, step, classify = sys.argv.pop(1), Reporter.step, accuracy._classify

def reported(reporter):
    step(reporter)
    if where == "step" and reporter._progress.step == 4:
        die()

def classified(*arguments):
    if where == "evaluation":
        die()
    return classify(*arguments)

Reporter.step, accuracy._classify = reported, classified
sys.exit(train.main())
"""


@pytest.fixture
def peers(tmp_path: Path, options: Sequence[str]) -> Callable[[str], list[str]]:
    """Arguments of ``python`` for processes of which one is killed."""
    script = tmp_path / "peers.py"
    script.write_text(_PEER, encoding="utf-8")
    run = f"output.dir={tmp_path / 'run'}"
    return lambda where: [str(script), where, "--config", "digits", *options, run, "train.batch_size=40"]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_killed_process_under_a_launcher(
    command: Callable[..., Any],
    peers: Callable[[str], list[str]],
    options: Sequence[str],
    tmp_path: Path,
    launcher: str,
) -> None:
    *start, _ = launch(launcher, 2)  # a script, and no module
    ended = command(*start, *peers("step"), timeout=120)
    assert ended.returncode != 0
    assert _said(ended) == [f"dge-train: error: {PEER}{AGAIN}"]
    summary = train(load_config("digits", [*options, f"output.dir={tmp_path / 'run'}"]), resume="auto")
    assert summary["steps"] == 10


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_a_killed_process_on_another_machine(
    environment: dict[str, str], peers: Callable[[str], list[str]], where: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first, second = (
        subprocess.Popen(
            [sys.executable, *peers(where)],
            env=environment | meeting | {"RANK": str(rank), "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    )
    try:
        second.communicate(timeout=120)
        start = time.monotonic()
        _, err = first.communicate(timeout=60)  # no launcher ends it
        assert time.monotonic() - start < 30
    finally:
        first.kill()
        second.kill()
    assert (first.returncode, second.returncode) == (75, -signal.SIGKILL), err
    said = [line for line in err.splitlines() if not line.startswith("epoch ")]
    assert said == [f"dge-train: error: {PEER}{AGAIN}"]
