"""The examples in the docstrings and in the README run as they stand."""

import doctest
from pathlib import Path

import pytest

import dge_kernels
from dge_kernels import functional

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("name", [*functional.__all__, "build_info"])
def test_every_function_has_an_example_that_runs(name: str) -> None:
    function = getattr(dge_kernels, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted >= 2
    assert result.failed == 0


@pytest.mark.skipif(not README.exists(), reason="the tests were copied away from the README")
def test_readme() -> None:
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted >= 5
    assert result.failed == 0
