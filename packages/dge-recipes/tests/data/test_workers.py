"""Data loading processes ignore requests to stop, and end with the process that they work for."""

from collections.abc import Callable
from typing import Any

_SCRIPT = """
import os, signal, time
from torch.utils.data import DataLoader
from dge_recipes.data.workers import worker_signals

loader = DataLoader(range(100), 1, num_workers=2, persistent_workers=True, worker_init_fn=worker_signals())
batches = iter(loader)
next(batches)
workers = [worker.pid for worker in batches._workers]
for worker in workers:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(worker, number)
time.sleep(0.5)
assert len(list(batches)) == 99
keep = iter(loader)  # still in use at exit, and so never shut down
print("alive", all(os.path.exists(f"/proc/{worker}") for worker in workers), flush=True)
"""


def test_workers_outlive_signals_but_not_their_parent(command: Callable[..., Any]) -> None:
    result = command("-c", _SCRIPT, timeout=120)  # a parent that waited for its workers would never return
    assert result.returncode == 0, result.stderr
    assert result.stdout == "alive True\n"
