"""Which method is taken: the closest to the dense model of those that save time."""

import pytest

from dge_recipes.compress.choice import Result, choose
from dge_recipes.compress.fidelity import Fidelity


def _result(
    method: str, class_cosine: float, against_dense: float, token_cosine: float = 0.9, agreement: float | None = None
) -> Result:
    fidelity = Fidelity(0.6, class_cosine, token_cosine, agreement)
    return Result(method, fidelity, 10 * against_dense, against_dense, 1 / 0.6, 1.0)


def test_fidelity_decides_among_those_that_save_time() -> None:
    close, fast = _result("merge", 0.99, 1.3), _result("route", 0.95, 1.6)
    choice = choose([fast, close], 0.6)
    assert choice.method == "merge"
    assert choice.why == "the closest to the dense model of those that save 20% of its time or more"


def test_who_saves_macs_alone_is_passed_over() -> None:
    # 0.6 stands for 40 % of the time, and half of that is needed: 1.25 times the speed.
    assert choose([_result("merge", 0.99, 1.24), _result("route", 0.95, 1.6)], 0.6).method == "route"
    assert choose([_result("merge", 0.99, 1.26), _result("route", 0.95, 1.6)], 0.6).method == "merge"


def test_where_none_saves_time_the_fastest_is_taken_and_it_is_said() -> None:
    choice = choose([_result("merge", 0.99, 0.9), _result("route", 0.95, 1.1)], 0.6)
    assert (choice.method, "none saves 20%" in choice.why) == ("route", True)


def test_tokens_count_where_nothing_classifies() -> None:
    one, other = {"class_cosine": 0.99, "token_cosine": 0.80}, {"class_cosine": 0.98, "token_cosine": 0.97}
    headless = [_result("merge", against_dense=1.5, **one), _result("route", against_dense=1.5, **other)]
    assert choose(headless, 0.6).method == "route"
    heads = [
        _result("merge", against_dense=1.5, agreement=1.0, **one),
        _result("route", against_dense=1.5, agreement=1.0, **other),
    ]
    assert choose(heads, 0.6).method == "merge"


def test_json() -> None:
    found = _result("merge", 0.99, 1.5).as_dict()
    assert found["mac_ratio"] == 0.6
    assert found["agreement"] is None
    assert found["implied"] == pytest.approx(1.667, abs=1e-3)
