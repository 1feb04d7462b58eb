"""Loading of the compiled libraries, and what to say when one cannot be loaded.

Importing this package never fails for a library's sake: `dge_kernels.info` and the first call that needs the
library report the reason kept here. An editable install whose C++ sources changed after its build warns at import.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

import dge_kernels

__all__ = ["BUILD", "CPU", "CUDA", "Library", "instruction_set", "newer_source", "require"]

# One folder; in an editable install two, as the compiled files then lie apart from the Python sources.
_FOLDERS = [Path(folder) for folder in dge_kernels.__path__]
_OLDEST_TORCH = (2, 10)


@dataclass(frozen=True)
class Library:
    """One compiled library: where it is, and why it is not loaded if it is not."""

    name: str
    path: Path
    reason: str | None

    @property
    def loaded(self) -> bool:
        """Whether its kernels are registered with torch."""
        return self.reason is None


def _import_build_facts() -> ModuleType | None:
    try:
        return importlib.import_module("dge_kernels._build")
    except ImportError:
        return None


BUILD = _import_build_facts()


def _find(name: str) -> Path:
    """The compiled file of this name, or where it would be if nothing were missing."""
    paths = [folder / name for folder in _FOLDERS]
    return next((path for path in paths if path.exists()), paths[-1])


def newer_source(package: Path, built: Path) -> Path | None:
    """A file of the package's C++ side that changed after the library `built` was made of it; None if none did."""
    time = built.stat().st_mtime
    files = [package / "CMakeLists.txt", *(package / "cmake").glob("*"), *(package / "csrc").rglob("*")]
    return next((file for file in files if file.is_file() and file.stat().st_mtime > time), None)


def _warn_if_stale(library: Library) -> None:
    """In an editable install, name the first source that is newer than what was built from it."""
    sources = Path(__file__).resolve().parents[2]
    if len(_FOLDERS) > 1 and library.path.exists() and (sources / "csrc").is_dir():
        newer = newer_source(sources, library.path)
        if newer is not None:
            warnings.warn(
                f"dge_kernels: {newer} changed after the kernels were compiled: run ci/dev, which builds what changed",
                stacklevel=2,
            )


def _load(path: Path) -> str | None:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load beside torch {torch.__version__}: {error}"
    return None


def _load_cpu() -> Library:
    path = _find("libdge_kernels_cpu.so")
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < _OLDEST_TORCH:
        reason: str | None = f"torch {torch.__version__} is older than 2.10: install torch >= 2.10"
    elif not path.exists():
        reason = f"{path.name} is missing: dge_kernels was not installed but imported from its sources; run pip install"
    else:
        reason = _load(path) or _capability_mismatch(path)
    return Library("cpu", path, reason)


def instruction_set(path: Path) -> str:
    """The vector instructions that the CPU library at `path` uses here: baseline, avx2 or avx512."""
    name = ctypes.CDLL(str(path)).dge_kernels_cpu_instruction_set
    name.restype = ctypes.c_char_p
    return str(name().decode())


def _capability_mismatch(path: Path) -> str | None:
    wanted = os.environ.get("DGE_CPU_CAPABILITY")
    if wanted is None or wanted == instruction_set(path):
        return None
    return f"DGE_CPU_CAPABILITY must be baseline, or avx2 or avx512 where the machine has them, got {wanted!r}"


def _cuda_mismatch() -> str | None:
    """Why the CUDA library cannot fit this torch, from the versions alone."""
    built = BUILD.cuda_version if BUILD else None
    if built is None:
        return "dge-kernels was built without CUDA: build it where nvcc is on the PATH, or install a +cu wheel"
    wanted = torch.version.cuda
    if wanted is None:
        return f"torch {torch.__version__} is a CPU build: install a CUDA {built} build of torch to use the GPU"
    if wanted.split(".")[0] != built.split(".")[0]:
        label = "cu" + "".join(wanted.split(".")[:2])
        return (
            f"dge-kernels was built for CUDA {built} and torch {torch.__version__} for CUDA {wanted}: "
            f"install the dge-kernels wheel labelled +{label}, or build it from source"
        )
    return None


def _load_cuda(cpu: Library) -> Library:
    path = _find("libdge_kernels_cuda.so")
    reason = cpu.reason or _cuda_mismatch()
    if reason is None:
        missing = f"{path.name} is missing from {path.parent}: install dge-kernels again"
        reason = _load(path) if path.exists() else missing
    return Library("cuda", path, reason)


CPU = _load_cpu()
CUDA = _load_cuda(CPU)
_warn_if_stale(CPU)


def require(device: torch.device) -> None:
    """Raise unless the kernels for `device` are loaded.

    Raises:
        RuntimeError: The library for the device did not load; the message says why and what to install.
        ValueError: The device is neither a CPU nor a CUDA device.
    """
    if not CPU.loaded:
        raise RuntimeError(f"dge_kernels cannot run: {CPU.reason} (dge_kernels.reference needs no library)")
    if device.type == "cuda" and not CUDA.loaded:
        raise RuntimeError(f"dge_kernels has no CUDA kernels here: {CUDA.reason}")
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"dge_kernels has kernels for cpu and cuda, got a tensor on {device}")
