"""What the tests of ``examples/`` and ``benchmarks/`` share; the packages' tests have conftests of their own."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from small_recipes import SMALL, forget_accelerate

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small() -> Sequence[str]:
    """Overrides that make the digits recipes small."""
    return SMALL


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in singletons; a test must not see an earlier one's."""
    yield
    forget_accelerate()
