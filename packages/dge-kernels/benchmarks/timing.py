"""Timing of several things in one run, in turns, and the description of the machine they ran on."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dge_kernels


def in_turns(candidates: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, called in turns so that a change of the machine's pace meets them all."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(_time_once(call, device))
    return {name: statistics.median(samples) for name, samples in times.items()}


def _time_once(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return run.stdout.strip() or "unknown"


def machine(device: str) -> dict[str, object]:
    """What a figure must be read with: device, versions, commit, date."""
    facts = dge_kernels.build_info()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": facts["torch"],
        "dge_kernels": facts["version"],
        "instruction_set": facts["cpu_instruction_set"],
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }
