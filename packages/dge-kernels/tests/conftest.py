"""Fixtures: every test that takes `device` runs on the CPU and, where there is one, on a CUDA device."""

import pytest
import torch


def _cuda() -> "pytest.param":
    missing = not torch.cuda.is_available()
    marks = [pytest.mark.gpu, pytest.mark.skipif(missing, reason="this machine has no CUDA device")]
    return pytest.param("cuda", marks=marks)


@pytest.fixture(params=["cpu", _cuda()])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20211206)
