"""Targets, what they need, and packages that run without Python."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import build_plain
from small_models import build_small
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from dge_models import export_formats, merge_tokens, open_exported, set_fixed_queries
from dge_models.export_formats import export_format, write_exported

_RUNNER = Path(__file__).parent / "cpp_runner" / "run_package.cpp"
_TORCH = Path(torch.__file__).parent


def test_targets_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert export_format("pt2", "bf16").file == "model.pt2"
    with pytest.raises(ValueError, match=r"to: got 'tflite'; expected one of onnx, openvino, pt2"):
        export_format("tflite")
    with pytest.raises(ValueError, match=r"precision: got 'fp16' for onnx; expected fp32 or int8 for onnx, fp32 or"):
        export_format("onnx", "fp16")
    with pytest.raises(
        ValueError, match=r"batch: got a dynamic one for pt2, whose shapes are fixed; expected a number"
    ):
        export_format("pt2", dynamic_batch=True)
    monkeypatch.setattr(export_formats, "_importable", lambda name: name != "openvino")
    with pytest.raises(ImportError, match=r"'openvino' needs openvino, which is not installed: pip install openvino"):
        export_format("openvino")


def test_a_file_of_no_target() -> None:
    with pytest.raises(ValueError, match=r"path: got model.bin; expected one of model.onnx, model.xml, model.pt2"):
        open_exported(Path("model.bin"))


def _compiled_runner(folder: Path) -> Path:
    compiler, program = shutil.which("g++") or shutil.which("clang++"), folder / "run_package"
    include, libraries = _TORCH / "include", _TORCH / "lib"
    paths = [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", f"-L{libraries}"]
    linked = [f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [str(compiler), "-std=c++20", "-O0", str(_RUNNER), "-o", str(program), *paths, *linked]
    subprocess.run(command, check=True)
    return program


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="an AOTInductor package needs a C++ compiler"
)


def _fixed_model() -> tuple[Any, torch.Tensor]:
    """A model of fixed queries, and images for it."""
    model: Any = build_small(depth=1, global_pool="avg")
    images = torch.randn(2, 3, 32, 32)
    set_fixed_queries(model, 0.7)
    return model, images


@needs_compiler
def test_a_package_runs_in_python_and_in_a_program_without_it(tmp_path: Path) -> None:
    model, images = _fixed_model()
    path = tmp_path / "model.pt2"
    write_exported(model, images, path, to="pt2")
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(open_exported(path)(images), expected, atol=1e-5, rtol=0)
    (tmp_path / "input").write_bytes(images.numpy().tobytes())
    shape = [str(extent) for extent in images.shape]
    command = [str(_compiled_runner(tmp_path)), str(path), str(tmp_path / "input"), str(tmp_path / "output"), *shape]
    subprocess.run(command, check=True)
    output = torch.frombuffer(bytearray((tmp_path / "output").read_bytes()), dtype=torch.float32)
    torch.testing.assert_close(output.view(expected.shape), expected, atol=1e-5, rtol=0)


@needs_compiler
def test_a_package_in_bf16_computes_what_the_model_does_in_bf16(tmp_path: Path) -> None:
    model, images = _fixed_model()
    write_exported(model, images, tmp_path / "model.pt2", to="pt2", precision="bf16")
    with torch.no_grad():
        exact, expected = model(images), copy.deepcopy(model).bfloat16()(images.bfloat16()).float()
    got = open_exported(tmp_path / "model.pt2")(images)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=2e-2 * float(exact.abs().max()), rtol=0)
    assert (got - exact).abs().max() > 1e-5  # it is not computed in float32


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (InvalidCxxCompiler(), ImportError, "needs a C\\+\\+ compiler, and none works: install g"),
        (InductorError(InvalidCxxCompiler(), None), ImportError, "needs a C\\+\\+ compiler, and none works"),
        (InductorError(AssertionError("vr"), None), RuntimeError, "Inductor fails on it .*vr.*; the other targets may"),
    ],
)
def test_what_inductor_cannot_do(
    raised: Exception, kind: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(kind, match=words):
        write_exported(torch.nn.Identity().eval(), torch.ones(2, 3), tmp_path / "model.pt2", to="pt2")


def test_merging_in_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = merge_tokens(build_plain(img_size=32, depth=1), 0.85, adaptive=False)
    images = torch.randn(2, 3, 32, 32)
    write_exported(model, images, tmp_path / "model.onnx", to="onnx")
    with torch.no_grad():
        torch.testing.assert_close(open_exported(tmp_path / "model.onnx")(images), model(images), atol=1e-4, rtol=1e-4)
