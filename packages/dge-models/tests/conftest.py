"""Seeds, small models and the recorded cases, for all tests."""

from __future__ import annotations

import pytest
import torch
from golden import Golden
from small_models import Build, build_small


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small() -> Build:
    """Builds a small routed model in which all splits occur."""
    return build_small


@pytest.fixture(scope="session")
def golden_dge() -> Golden:
    """DGE-DeiT-Ti."""
    return Golden("deit_dge_tiny")


@pytest.fixture(scope="session")
def golden_pvt() -> Golden:
    """DGE-PVT-Tiny."""
    return Golden("pvt_dge_tiny")


@pytest.fixture(scope="session")
def golden_dpvt() -> Golden:
    """DPVT-Small."""
    return Golden("dpvt_small")


@pytest.fixture(scope="session")
def golden_dense() -> Golden:
    """DeiT-Ti."""
    return Golden("deit_tiny")
