"""Timing several things fairly: in turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

__all__ = ["time_in_turns"]

Input = TypeVar("Input")


def time_in_turns(
    runs: Mapping[str, Callable[[Input], object]],
    inputs: Sequence[Input],
    rounds: int,
    *,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Call each with the same input, then each with the next one, and so on; compare medians.

    Args:
        runs: By name.
        inputs: Taken in turn, the same one for all.
        rounds: Timed calls of each.
        warmup: Calls of each before the timed ones.
        device: Where they compute; an accelerator is waited for before and after each call.
        clock: Seconds; the wall's by default. ``time.thread_time`` leaves out what other programs take, if all is
            computed by the calling thread.

    Returns:
        Seconds of each timed call, by name.

    Raises:
        ValueError: No inputs, or a negative number of calls.
    """
    if not inputs:
        raise ValueError("inputs: got none; expected at least one")
    for name, count in (("rounds", rounds), ("warmup", warmup)):
        if count < 0:
            raise ValueError(f"{name}: got {count}; expected at least 0")
    waits = torch.device(device).type != "cpu"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        for name, run in runs.items():
            elapsed = _time_once(run, inputs[turn % len(inputs)], waits, clock)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def _time_once(run: Callable[[Input], object], given: Input, waits: bool, clock: Callable[[], float]) -> float:
    if waits:
        torch.accelerator.synchronize()
    start = clock()
    run(given)
    if waits:
        torch.accelerator.synchronize()
    return clock() - start
