"""What the compiler made of the CUDA kernels, for every architecture in the library: nothing here needs a GPU."""

import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import dge_kernels as dk
from dge_kernels import _library

# The kernels that move channels in packs of 16 bytes: their template argument is the number of items in one.
WIDE = {"gather_kernel", "scatter_kernel", "route_kernel"}
ARCHITECTURES = [name for name in dk.build_info()["cuda_architectures"] if not name.endswith("+PTX")]
ITEMS = {"float": 4, "double": 2, "__half": 8, "__nv_bfloat16": 8}


def _cuobjdump() -> str | None:
    """cuobjdump from the CUDA toolkit, or the copy that Triton, a dependency of CUDA builds of torch, brings."""
    triton = find_spec("triton")
    folders = [Path(place) / "backends/nvidia/bin" for place in (triton.submodule_search_locations if triton else [])]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(map(str, folders)))


@cache
def _dump(what: str) -> str:
    tool = _cuobjdump()
    if not _library.CUDA.path.exists():
        pytest.skip("this copy was built without CUDA")
    if tool is None:
        pytest.skip("cuobjdump is neither on the PATH nor with Triton")
    run = subprocess.run([tool, what, str(_library.CUDA.path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def _kernels(text: str) -> list[tuple[str, str]]:
    """The mangled name of every kernel, with what the dump says of it."""
    parts = re.split(r"Function\s*:?\s*([A-Za-z_]\w+)\s*:?", text)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _is_wide(name: str) -> bool:
    kernel = next((kernel for kernel in WIDE if kernel in name), None)
    width = re.search(r"Li(\d+)E", name)
    return kernel is not None and width is not None and int(width.group(1)) > 1


def test_no_kernel_spills_or_has_an_array_in_local_memory() -> None:
    usage = {(name, facts.split("TEXTURE")[0]) for name, facts in _kernels(_dump("--dump-resource-usage"))}
    assert len(usage) >= len(WIDE) * len(ITEMS) * len(ARCHITECTURES)
    bad = [(name, facts) for name, facts in usage if "STACK:0 " not in facts or "LOCAL:0 " not in facts]
    assert not bad


def test_channels_move_16_bytes_at_a_time() -> None:
    wide = [(name, code) for name, code in _kernels(_dump("--dump-sass")) if _is_wide(name)]
    assert len(wide) == len(WIDE) * len(ITEMS) * len(ARCHITECTURES)
    for name, code in wide:
        moves = re.findall(r"\b(LDG|STG)\.E((?:\.\w+)*)", code)
        loads = [kind for kind, kind_of in moves if kind == "LDG" and ".128" in kind_of]
        assert loads, f"{name} has no 16-byte load"
        if "route_kernel" not in name:
            stores = [kind_of for kind, kind_of in moves if kind == "STG"]
            assert stores and all(".128" in kind_of for kind_of in stores), f"{name} stores less than 16 bytes"
