from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from dge_models import time_in_turns


def _run(called: list[str], name: str, seconds: float = 0.0) -> Callable[[int], None]:
    def run(given: int) -> None:
        called.append(f"{name}{given}")
        time.sleep(seconds)

    return run


def test_each_is_called_with_the_same_inputs_in_turns() -> None:
    called: list[str] = []
    seconds = time_in_turns({"a": _run(called, "a", 0.02), "b": _run(called, "b")}, [0, 1], 3, warmup=1)
    assert called == ["a0", "b0", "a1", "b1", "a0", "b0", "a1", "b1"]
    assert [len(each) for each in seconds.values()] == [3, 3]
    assert min(seconds["a"]) >= 0.02 > sorted(seconds["b"])[1]


def test_another_clock_can_be_asked() -> None:
    ticks = iter(range(100))
    seconds = time_in_turns({"a": abs, "b": abs}, [0], 2, warmup=0, clock=lambda: float(next(ticks)) ** 2)
    assert seconds == {"a": [1.0, 9.0], "b": [5.0, 13.0]}


def test_nothing_timed_is_nothing_called() -> None:
    called: list[str] = []
    assert time_in_turns({"a": _run(called, "a")}, [0], 0, warmup=0) == {"a": []}
    assert not called


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs: got none; expected at least one"):
        time_in_turns({"a": print}, [], 1)
    with pytest.raises(ValueError, match=r"rounds: got -1; expected at least 0"):
        time_in_turns({"a": print}, [0], -1)
    with pytest.raises(ValueError, match=r"warmup: got -2; expected at least 0"):
        time_in_turns({"a": print}, [0], 1, warmup=-2)
