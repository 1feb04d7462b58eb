"""What a model is exported to: ONNX, OpenVINO and AOTInductor packages, written and run again."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FORMATS", "INPUT", "LARGEST_BATCH", "OUTPUT", "Format", "export_format", "open_exported", "write_exported"]

INPUT, OUTPUT = "images", "output"
"""What the exported graphs call their input and their output."""

LARGEST_BATCH = 1024
"""Of an export with a dynamic batch."""

_OPSET = 18


@dataclass(frozen=True)
class Format:
    """One target.

    Attributes:
        file: What the artefact is called.
        precisions: What it can be exported in, the first by default.
        packages: What has to be installed beside PyTorch, by the names to import; pip calls them the same.
        runtime: Of those, what runs it.
        dynamic: Whether the number of images may be left open.
    """

    file: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...]
    runtime: str
    dynamic: bool


FORMATS = {
    "onnx": Format("model.onnx", ("fp32", "int8"), ("onnx", "onnxscript", "onnxruntime"), "onnxruntime", True),
    "openvino": Format("model.xml", ("fp32", "fp16"), ("onnx", "onnxscript", "openvino"), "openvino", True),
    "pt2": Format("model.pt2", ("fp32", "bf16"), (), "torch", False),
}


def export_format(to: str, precision: str = "fp32", *, dynamic_batch: bool = False) -> Format:
    """The target of this name.

    Raises:
        ImportError: What it needs is not installed; the error names the packages.
        ValueError: There is no such target, or not in that precision, or not with a dynamic batch.
    """
    if to not in FORMATS:
        raise ValueError(f"to: got {to!r}; expected one of {', '.join(FORMATS)}")
    chosen = FORMATS[to]
    if precision not in chosen.precisions:
        others = ", ".join(f"{' or '.join(each.precisions)} for {name}" for name, each in FORMATS.items())
        raise ValueError(f"precision: got {precision!r} for {to}; expected {others}")
    if dynamic_batch and not chosen.dynamic:
        others = " or ".join(name for name, each in FORMATS.items() if each.dynamic)
        raise ValueError(f"batch: got a dynamic one for {to}, whose shapes are fixed; expected a number, or {others}")
    missing = [name for name in chosen.packages if not _importable(name)]
    if missing:
        raise ImportError(
            f"to: {to!r} needs {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}"
        )
    return chosen


def _importable(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


def write_exported(
    model: nn.Module, images: Tensor, path: Path, *, to: str, precision: str = "fp32", dynamic_batch: bool = False
) -> None:
    """Write a model of static shapes.

    Args:
        model: In evaluation mode, on the CPU.
        images: float32 [N, C, H, W], an example; N is the batch that the export takes.
        path: The file, as :data:`FORMATS` calls it. Beside it may come files with the weights.
        to: One of :data:`FORMATS`.
        precision: As of the format. ``int8`` quantises weights per output channel, and activations as they come.
            ``fp16`` stores weights in half, and ``bf16`` computes all of the network in it; inputs and outputs stay
            float32.
        dynamic_batch: The export takes 1 to 1024 images instead of N. The example should have two or more.

    Raises:
        ImportError: A package or a C++ compiler is not installed.
        RuntimeError: The exporter cannot export the model.
        ValueError: As in :func:`export_format`.
    """
    export_format(to, precision, dynamic_batch=dynamic_batch)
    with _quiet(), torch.no_grad():
        if to == "pt2":
            _write_package(model, images, path, precision)
            return
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            plain = path if (to, precision) == ("onnx", "fp32") else Path(aside) / "model.onnx"
            _write_onnx(model, images, plain, dynamic_batch)
            if to == "openvino":
                openvino: Any = import_module("openvino")
                openvino.save_model(openvino.convert_model(plain), path, compress_to_fp16=precision == "fp16")
            elif precision == "int8":
                _quantise(plain, path, Path(aside))


def _write_onnx(model: nn.Module, images: Tensor, path: Path, dynamic_batch: bool) -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        opset_version=_OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=(batch,) if dynamic_batch else None,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    program.save(str(path))
    import_module("onnx").checker.check_model(str(path), full_check=True)


def _quantise(source: Path, path: Path, aside: Path) -> None:
    quantization: Any = import_module("onnxruntime.quantization")
    prepare: Any = import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    prepared = aside / "prepared.onnx"
    prepare(str(source), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_dynamic(prepared, path, per_channel=True, weight_type=quantization.QuantType.QInt8)


class _Lowered(nn.Module):
    """A copy of a model in another precision, its inputs and outputs float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = copy.deepcopy(model).to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x.to(self.dtype)).float()
        return output


def _write_package(model: nn.Module, images: Tensor, path: Path, precision: str) -> None:
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    wanted = model if precision == "fp32" else _Lowered(model, torch.bfloat16).eval()
    program = torch.export.export(wanted, (images,))
    try:
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"cpp.dynamic_threads": True},  # who runs it says how many, not who made it
        )
    except InvalidCxxCompiler as error:
        raise ImportError("to: 'pt2' needs a C++ compiler, and none works: install g++, or set CXX") from error
    except InductorError as error:
        if "InvalidCxxCompiler" in str(error):  # as Inductor wraps it
            raise ImportError("to: 'pt2' needs a C++ compiler, and none works: install g++, or set CXX") from error
        raise RuntimeError(f"PyTorch's Inductor fails on it ({error}); the other targets may take it") from error


def open_exported(path: Path, *, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Run an export on the CPU.

    Args:
        path: The artefact.
        threads: That the runtime may use; None: as many as it likes. A package uses those of PyTorch.

    Returns:
        From float32 [N, C, H, W] to the output; N as exported.

    Raises:
        ImportError: What runs it is not installed.
        ValueError: The file's name ends like none of :data:`FORMATS`.
    """
    to = next((name for name, each in FORMATS.items() if Path(each.file).suffix == path.suffix), None)
    if to is None:
        raise ValueError(f"path: got {path}; expected one of {', '.join(each.file for each in FORMATS.values())}")
    runtime: Any = import_module(FORMATS[to].runtime)
    if to == "onnx":
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads = threads or 0
        session = runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])
    if to == "openvino":
        # Some CPUs would compute in bfloat16 by default.
        options = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
        compiled = runtime.Core().compile_model(str(path), "CPU", options)
        return lambda images: torch.from_numpy(compiled([images.numpy()])[0].copy())
    package = torch._inductor.aoti_load_package(str(path))

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = package(images.contiguous())  # it takes strides for granted
        return output

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say to those who develop them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
