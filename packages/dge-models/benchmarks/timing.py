"""Timing of several things in one run, in turns, and the description of the machine they ran on."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch

import dge_models


def in_turns(
    candidates: dict[str, Callable[[], object]],
    device: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each candidate, called in turns so that a change of the machine's pace meets them all."""
    runs = {name: partial(_call, call) for name, call in candidates.items()}
    times = dge_models.time_in_turns(runs, [None], rounds, warmup=3, device=device, clock=clock)
    return {name: statistics.median(samples) for name, samples in times.items()}


def _call(call: Callable[[], object], _: None) -> None:
    call()


def peak_megabytes(device: str) -> float:
    """The most memory so far: of tensors on the GPU, of the whole process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage: what that reports starts, in a new process, at the size of the process that started it.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return run.stdout.strip() or "unknown"


def machine(device: str) -> dict[str, object]:
    """What a figure must be read with: device, versions, commit, date."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }
