"""Where the time of an exported model goes: milliseconds by kind of operator, as the runtimes count them."""

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from dge_models.export_formats import INPUT
from dge_recipes import markdown

__all__ = ["compare_profiles", "print_profiles", "profile"]

Cost = tuple[int, float]
_WARM = 2


def profile(path: Path, images: Tensor, rounds: int) -> dict[str, Cost]:
    """How many operators of each kind a forward runs, and the milliseconds of them all, on one thread.

    Args:
        path: From ``export_model``, to ONNX or OpenVINO.
        images: float32 [N, C, H, W], a batch that it takes.
        rounds: Counted forwards, after two that are not. An operator's time is its median.
    """
    forwards = _onnxruntime if path.suffix == ".onnx" else _openvino
    seen: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for name, kind, milliseconds in forwards(path, images, rounds):
        seen[name].append(milliseconds)
        kinds[name] = kind
    found: dict[str, Cost] = {}
    for name, times in seen.items():
        if len(times) < rounds + _WARM:  # constants, computed in the first forward alone
            continue
        count, total = found.get(kinds[name], (0, 0.0))
        found[kinds[name]] = count + 1, total + statistics.median(times[_WARM:])
    return found


def _onnxruntime(path: Path, images: Tensor, rounds: int) -> Iterator[tuple[str, str, float]]:
    """Name, kind and milliseconds of each operator of each forward."""
    runtime: Any = import_module("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="dge-profile-") as folder:
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads, settings.enable_profiling = 1, True
        settings.profile_file_prefix = f"{folder}/profile"
        session = runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        for _ in range(rounds + _WARM):
            session.run(None, {INPUT: images.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            yield event["name"], event["args"]["op_name"], event["dur"] / 1e3


def _openvino(path: Path, images: Tensor, rounds: int) -> Iterator[tuple[str, str, float]]:
    """As above, of the operators that were executed; what they run as is part of their kind."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERF_COUNT": True}
    runtime: Any = import_module("openvino")
    request = runtime.Core().compile_model(str(path), "CPU", options).create_infer_request()
    for _ in range(rounds + _WARM):
        request.infer([images.numpy()])
        for node in request.profiling_info:
            if node.status == runtime.ProfilingInfo.Status.EXECUTED:
                kind = f"{node.node_type} ({node.exec_type})"
                yield node.node_name, kind, node.real_time.total_seconds() * 1e3


def compare_profiles(profiles: Mapping[str, Mapping[str, Cost]]) -> list[dict[str, Any]]:
    """A row per kind of operator with count and milliseconds in each model, the most expensive kinds first.

    Args:
        profiles: By the model's name, from :func:`profile`.
    """
    kinds = {kind for each in profiles.values() for kind in each}
    rows = [
        {
            "operator": kind,
            **{
                name: dict(zip(("count", "ms"), each.get(kind, (0, 0.0)), strict=True))
                for name, each in profiles.items()
            },
        }
        for kind in kinds
    ]
    return sorted(rows, key=lambda row: (-max(row[name]["ms"] for name in profiles), row["operator"]))


def print_profiles(rows: list[dict[str, Any]], title: str, most: int = 12) -> None:
    """A Markdown table of the most expensive kinds and of all together."""
    names = [name for name in rows[0] if name != "operator"]
    columns = [column for name in names for column in (f"{name}, ms", "operators")]
    print("\n" + "\n".join(markdown.head([title, *columns])))
    total = {name: {key: sum(row[name][key] for row in rows) for key in ("count", "ms")} for name in names}
    for row in [*rows[:most], {"operator": "all", **total}]:
        cells = (cell for name in names for cell in (f"{row[name]['ms']:.2f}", str(row[name]["count"])))
        print(markdown.line((row["operator"], *cells)), flush=True)
