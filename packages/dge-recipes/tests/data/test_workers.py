"""Data loading processes ignore requests to stop, end with the process that they work for, and are missed if lost."""

import re
from collections.abc import Callable
from typing import Any

import pytest

_SCRIPT = """
import os, signal, time
from torch.utils.data import DataLoader
from dge_recipes.data.workers import worker_signals

loader = DataLoader(range(100), 1, num_workers=2, persistent_workers=True, worker_init_fn=worker_signals())
batches = iter(loader)
next(batches), next(batches)  # one of each worker: both have begun
workers = [worker.pid for worker in batches._workers]
for worker in workers:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(worker, number)
time.sleep(0.5)
assert len(list(batches)) == 98
keep = iter(loader)  # still in use at exit, and so never shut down
print("alive", all(os.path.exists(f"/proc/{worker}") for worker in workers), flush=True)
"""


def test_workers_outlive_signals_but_not_their_parent(command: Callable[..., Any]) -> None:
    result = command("-c", _SCRIPT, timeout=120)  # a parent that waited for its workers would never return
    assert result.returncode == 0, result.stderr
    assert result.stdout == "alive True\n"


_LOST = """
import gc, os, resource, signal, sys, threading, time
import torch
from torch.utils.data import DataLoader, TensorDataset
from dge_recipes.data.workers import forget_workers, kill_workers, watched, worker_context, worker_signals
from dge_recipes.machine_errors import machine_errors

def loader(prepare=worker_signals(), collate=None):
    images = TensorDataset(torch.zeros(400, 3, 8, 8), torch.zeros(400))
    return DataLoader(
        images, 4, num_workers=2, persistent_workers=True, collate_fn=collate,
        worker_init_fn=prepare, multiprocessing_context=worker_context(),
    )

def tell(case, batches, worker=0):
    start = time.monotonic()
    try:
        with machine_errors():
            for batch in batches:
                pass
        told = "no error"
    except Exception as error:
        while "DataLoader worker" in str(error) and isinstance(error.__cause__, RuntimeError | ValueError):
            error = error.__cause__  # PyTorch's words are of ours
        told = f"{type(error).__name__}: {error}"
    soon = "soon" if time.monotonic() - start < 3 else "late"
    print(case, soon, told.replace(f"process {worker}", "process N"), sep="|", flush=True)
    forget_workers()
    batches = None
    kill_workers()  # PyTorch would wait 5 s for each that is left, whenever the loader is collected: in a later case
    gc.collect()

def killed_between_batches(number):
    images = loader()
    batches = watched(images)
    next(batches)
    worker = images._iterator._workers[1].pid
    os.kill(worker, number)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # Python handles signals here
        pass
    tell(number.name, batches, worker)

def killed_when_waited_for():
    images = loader()
    batches = watched(images)
    next(batches)
    worker = images._iterator._workers[1].pid
    os.kill(worker, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
    tell("waiting", batches, worker)

class EndsItself:
    def __len__(self):
        return 400

    def __getitem__(self, index):
        if index == 100:  # here it holds no lock of PyTorch's
            os.kill(os.getpid(), signal.SIGKILL)
        return index

class Limit:
    def __init__(self, free):
        self.free, self.before = free, worker_signals()

    def __call__(self, worker):
        self.before(worker)
        last = max(map(int, os.listdir("/proc/self/fd")))
        while (next_one := os.open("/dev/null", os.O_RDONLY)) <= last:
            pass  # none is free below
        os.close(next_one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + self.free,) * 2)

def another_loader():
    # of which this package knows nothing
    tell("another", iter(DataLoader(EndsItself(), 4, num_workers=1)))

tell("no workers", watched(DataLoader(range(4))))
print("handler", signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "", sep="|")
for number in (signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV):
    killed_between_batches(number)
killed_when_waited_for()
another_loader()
tell("unsent", watched(loader(collate=lambda samples: open("/dev/null"))))  # has no pickle
for free in map(int, sys.argv[1:]):
    tell(free, watched(loader(Limit(free))))
"""

_HELD = """
import os, time
from dge_recipes.data.workers import worker_context

context = worker_context()
event = context.Event()

parent = os.getpid()

def look():
    while not event.is_set() and os.getppid() == parent:
        pass

for _ in range(10):  # most of the time it looks
    process = context.Process(target=look)
    process.start()
    time.sleep(0.02)
    process.kill()
    process.join()
event.set()
print(event.is_set())
"""


def test_a_killed_worker_holds_no_lock_of_the_event_that_ends_workers(command: Callable[..., Any]) -> None:
    assert command("-c", _HELD, timeout=240).stdout == "True\n"


# In a worker's loop, in its thread that sends batches, in its thread that hands out their memory; 12 are enough.
_FREE = (0, 1, 2, 3, 4, 12)


@pytest.fixture(scope="module")
def lost(command: Callable[..., Any]) -> dict[str, tuple[str, str]]:
    """What is told of each worker that is lost, and whether it is told soon."""
    result = command("-c", _LOST, *map(str, _FREE), timeout=280)
    assert result.returncode == 0, result.stderr
    assert "TypeError: cannot pickle" in result.stderr  # of the worker that could not send its batch
    assert "Too many open files" not in result.stderr
    return {case: (when, told) for case, when, told in (line.split("|") for line in result.stdout.splitlines())}


@pytest.mark.parametrize("case", ["SIGKILL", "waiting"])
def test_a_worker_that_is_killed(lost: dict[str, tuple[str, str]], case: str) -> None:
    killed = "MachineError: data loading process N was killed (SIGKILL), as the system does when memory runs out"
    assert lost[case] == ("soon", f"{killed}; fewer data.workers or smaller batches may help")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("SIGBUS", r"MachineError: a bus error \(SIGBUS\) ended data loading process N: /dev/shm is full, or .*"),
        ("SIGSEGV", r"RuntimeError: data loading process N crashed \(SIGSEGV\); with data.workers=0 .*"),
        ("unsent", r"RuntimeError: data loading process \d+ ended with status 1; with data.workers=0 .*"),
    ],
)
def test_a_worker_that_crashes(lost: dict[str, tuple[str, str]], case: str, words: str) -> None:
    when, told = lost[case]
    assert when == "soon"
    assert re.fullmatch(words, told)


def test_other_loaders_are_left_alone(lost: dict[str, tuple[str, str]]) -> None:
    assert lost["no workers"] == ("soon", "no error")
    assert lost["handler"][0] == "True"
    when, told = lost["another"]
    assert when == "soon"  # PyTorch's own handler still works; which read notices the end first is chance
    whole = ("RuntimeError: DataLoader worker (pid", "MachineError: Connection reset by peer", "EOFError: ")
    assert told.startswith(whole)


@pytest.mark.parametrize("free", _FREE)
def test_a_worker_without_descriptors_is_not_waited_for(lost: dict[str, tuple[str, str]], free: int) -> None:
    told = re.sub(r"data loading process \d+: ", "", lost[str(free)][1])
    expected = {"MachineError: too many open files; a higher ulimit -n or fewer data.workers may help"}
    if free > 0:  # then it depends on how fast batches are taken
        expected.add("no error")
    assert told in expected
