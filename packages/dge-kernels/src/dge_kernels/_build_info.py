"""The facts of this installation: versions, libraries, devices."""

from __future__ import annotations

import platform
from typing import TypedDict

import torch

from dge_kernels import _library

__all__ = ["BuildInfo", "build_info"]


class BuildInfo(TypedDict):
    """The facts that :func:`build_info` returns; None where a fact does not exist here."""

    version: str | None
    python: str
    torch: str
    torch_cuda: str | None
    built_with_torch: str | None
    oldest_torch: str | None
    compiler: str | None
    cuda_version: str | None
    cuda_architectures: list[str]
    cpu_loaded: bool
    cpu_reason: str | None
    cpu_instruction_set: str | None
    cpu_threads: int
    cuda_loaded: bool
    cuda_reason: str | None
    cuda_devices: list[str]


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def build_info() -> BuildInfo:
    """Collect the facts of this installation, without raising for what is missing.

    Returns:
        A dictionary that JSON can hold. `cpu_reason` and `cuda_reason` say why a library is not loaded.

    Example:
        >>> import dge_kernels
        >>> facts = dge_kernels.build_info()
        >>> facts["cpu_loaded"], facts["oldest_torch"]
        (True, '2.10')
    """
    build, cpu, cuda = _library.BUILD, _library.CPU, _library.CUDA
    return {
        "version": build.version if build else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "built_with_torch": build.torch_headers if build else None,
        "oldest_torch": build.torch_target if build else None,
        "compiler": build.compiler if build else None,
        "cuda_version": build.cuda_version if build else None,
        "cuda_architectures": [name for name in build.cuda_architectures.split(",") if name] if build else [],
        "cpu_loaded": cpu.loaded,
        "cpu_reason": cpu.reason,
        "cpu_instruction_set": _library.instruction_set(_library.CPU.path) if _library.CPU.loaded else None,
        "cpu_threads": torch.get_num_threads(),
        "cuda_loaded": cuda.loaded,
        "cuda_reason": cuda.reason,
        "cuda_devices": _cuda_devices(),
    }
