"""The examples in the docstrings and in the README run as they stand."""

import doctest
from pathlib import Path

import pytest

from dge_kernels import functional

README = Path(__file__).parents[1] / "README.md"


def test_docstrings() -> None:
    result = doctest.testmod(functional)
    assert result.attempted >= 5
    assert result.failed == 0


@pytest.mark.skipif(not README.exists(), reason="the tests were copied away from the README")
def test_readme() -> None:
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted >= 5
    assert result.failed == 0
