import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dge_kernels as dk
from dge_kernels import _library, info


def test_build_info_is_json_and_names_this_torch() -> None:
    facts = json.loads(json.dumps(dk.build_info()))
    assert facts["torch"] == torch.__version__
    assert facts["cpu_loaded"] and facts["cpu_reason"] is None
    assert facts["oldest_torch"] == "2.10"
    assert facts["version"] == dk.__version__


def test_cuda_is_on_or_has_a_reason() -> None:
    facts = dk.build_info()
    assert facts["cuda_loaded"] == (facts["cuda_reason"] is None)
    if facts["torch_cuda"] is None and facts["cuda_version"] is not None:
        assert "is a CPU build" in facts["cuda_reason"]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cpu_self_test"] == "ok"
    assert info.main([]) == 0
    assert "cpu self test" in capsys.readouterr().out


def test_runs_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-W", "error", "-m", "dge_kernels.info"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "cuda self test" in run.stdout


@pytest.mark.parametrize(
    ("built", "torch_cuda", "words"),
    [
        (None, "13.0", "built without CUDA"),
        ("13.0.88", None, "is a CPU build: install a CUDA 13.0.88 build of torch"),
        ("13.0.88", "12.8", "install the dge-kernels wheel labelled +cu128"),
        ("13.0.88", "13.1", None),
    ],
)
def test_versions_that_do_not_fit(
    built: str | None, torch_cuda: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "BUILD", type("Build", (), {"cuda_version": built}))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    reason = _library._cuda_mismatch()
    assert reason is None if words is None else words in (reason or "")


def test_a_missing_library_is_reported_by_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _library.Library("cpu", Path("gone.so"), "gone.so is missing")
    monkeypatch.setattr(_library, "CPU", missing)
    with pytest.raises(RuntimeError, match=r"dge_kernels cannot run: gone\.so is missing"):
        dk.plan_queries(torch.zeros(1, 1, 1, dtype=torch.int64))


def test_a_library_that_does_not_load_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    assert "broken.so does not load beside torch" in (_library._load(broken) or "")


_POOL = "import torch, dge_kernels as dk; p = dk.plan_queries(torch.zeros(1, 1, 1, dtype=torch.long)); "


def _in_new_process(code: str, capability: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DGE_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_the_instruction_set_can_be_chosen() -> None:
    run = _in_new_process(_POOL + "print(dk.build_info()['cpu_instruction_set'])", "baseline")
    assert run.stdout == "baseline\n", run.stderr


@pytest.mark.parametrize("capability", ["avx1024", ""])
def test_an_instruction_set_that_is_not_here_is_refused(capability: str) -> None:
    run = _in_new_process(_POOL, capability)
    words = f"DGE_CPU_CAPABILITY must be baseline, or avx2 or avx512 where the machine has them, got {capability!r}"
    assert f"RuntimeError: dge_kernels cannot run: {words}" in run.stderr


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("csrc/cpu/attention.h", True),
        ("csrc/schemas.cpp", True),
        ("cmake/Cuda.cmake", True),
        ("CMakeLists.txt", True),
        ("src/dge_kernels/functional.py", False),
        ("tests/cpp/check.h", False),
        (None, False),
    ],
)
def test_what_changed_after_the_build(changed: str | None, told: bool, tmp_path: Path) -> None:
    built = tmp_path / "libdge_kernels_cpu.so"
    sources = ("csrc/cpu/attention.h", "csrc/schemas.cpp", "cmake/Cuda.cmake", "CMakeLists.txt")
    for name in {*sources, changed or sources[0], built.name}:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1000, 1000 + (name == changed)))
    found = _library.newer_source(tmp_path, built)
    assert found == (tmp_path / str(changed) if told else None)
