"""From a model and pictures to a folder that other runtimes serve."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dge_models
from dge_recipes.compress.pictures import Pictures
from dge_recipes.compress.report import machine
from dge_recipes.compress.source import Dense
from dge_recipes.data.section import ImageData
from dge_recipes.data.transforms import evaluation_transform
from dge_recipes.errors import UserError
from dge_recipes.export.loader import loader_script
from dge_recipes.models import output_names
from dge_recipes.new_folder import new_folder

__all__ = ["DESCRIPTION", "SCRIPT", "Wishes", "check_wishes", "describe_preprocessing", "export"]

DESCRIPTION, SCRIPT = "model.json", "classify.py"

_CHECKED = 32  # pictures
_TIMED = (1, 8)  # batches, where the batch is dynamic


@dataclass(frozen=True)
class Wishes:
    """What a user wants.

    Attributes:
        to: "onnx", "openvino" or "pt2".
        ratio: mean MAC ratio; None: what the model spends now.
        batch: pictures at once; None: any number.
        precision: "fp32", or what the target has beside it.
        rounds: timed forwards of each model; 0: nothing is timed.
    """

    to: str
    ratio: float | None = None
    batch: int | None = 1
    precision: str = "fp32"
    rounds: int = 20


def check_wishes(wishes: Wishes) -> None:
    """Tell at once what cannot be had.

    Raises:
        UserError: the target does not have that precision or batch, or needs a package that is not installed.
    """
    with _told(""):
        dge_models.export_format(wishes.to, wishes.precision, dynamic_batch=wishes.batch is None)


def export(
    source: Dense, pictures: Pictures, wishes: Wishes, folder: Path, command: str, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Fix a model's shapes on pictures, export it, check it and time it.

    Args:
        source: the model, which is changed, on the CPU.
        pictures: those to calibrate on decide the counts; those held out, and more where they are few, are compared.
        wishes: what to export to, and how.
        folder: new or empty; it appears whole or not at all.
        command: the command line, for the description.
        tell: called with a line whenever something begins that takes time.

    Returns:
        What ``model.json`` says.

    Raises:
        UserError: the ratio is out of reach, the model cannot be exported, or its export's outputs differ.
    """
    model = source.model.eval()
    compared = torch.cat([*pictures.held_out, *pictures.calibration])[:_CHECKED]
    tell(f"calibrating on {sum(map(len, pictures.calibration))} pictures")
    with _told(f"model {source.name}: ", "; dge-compress makes a cheaper one of a dense model"):
        shapes = dge_models.fix_shapes(model, pictures.calibration, wishes.ratio)
    dense = None if shapes.kind == "dense" else dge_models.dense_copy(model)
    with new_folder(folder) as made:
        tell(f"exporting to {wishes.to} and comparing {len(compared)} pictures")
        written = _exported(model, compared, made, wishes, source.name)
        timings = []
        if wishes.rounds:
            tell("timing" if dense is None else "exporting the dense model in the same way, and timing")
            timings = _timings(written.path, dense, compared, wishes, shapes.ratio, source.name)
        facts = {
            "file": written.path.name,
            "model": source.name,
            "to": wishes.to,
            "precision": wishes.precision,
            "inputs": [{"name": written.input_name, "shape": written.input_shape, "dtype": "float32"}],
            "outputs": [{"name": written.output_name, "shape": written.output_shape, "dtype": "float32"}],
            "preprocessing": describe_preprocessing(pictures.section),
            "classes": output_names(model),
            "ratio": shapes.ratio,
            "asked_ratio": wishes.ratio,
            "kind": shapes.kind,
            "counts": shapes.counts,
            "pictures": pictures.facts,
            "against_pytorch": asdict(written.agreement),
            "against_dense": None if dense is None else _fidelity(model, dense, compared),
            "export_seconds": written.seconds,
            "timings": timings,
            "command": command,
            **machine(torch.device("cpu")),
            **{name: version(name) for name in _PACKAGES[wishes.to]},
        }
        (made / DESCRIPTION).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        classifies = getattr(model, "num_classes", 0) > 0
        script = loader_script(wishes.to, SCRIPT, classifies=classifies)
        (made / SCRIPT).write_text(script, encoding="utf-8")
    return facts


_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "pt2": ()}


def _exported(model: nn.Module, images: Tensor, folder: Path, wishes: Wishes, name: str) -> dge_models.Exported:
    with _told(f"model {name} cannot be exported to {wishes.to}: "):
        return dge_models.export_model(
            model, images, folder, to=wishes.to, batch=wishes.batch, precision=wishes.precision
        )


@contextmanager
def _told(before: str, after: str = "") -> Iterator[None]:
    """Inside ``with``, what is wrong with the model, the ratio or the environment becomes the user's, in one line."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{before}{text}{after if 'neither routes nor merges' in text else ''}") from error


def describe_preprocessing(section: ImageData) -> dict[str, Any]:
    """What the evaluation's transform does, in numbers."""
    steps = {type(step).__name__: step for step in evaluation_transform(section).transforms}
    return {
        "resize": steps["Resize"].size,
        "crop": steps["CenterCrop"].size[0],
        "interpolation": steps["Resize"].interpolation.value,
        "mean": section.mean,
        "std": section.std,
        "exif": section.exif,
    }


def _fidelity(model: nn.Module, dense: nn.Module, images: Tensor) -> dict[str, float]:
    """What constant counts keep of the dense model's outputs, in PyTorch."""
    with torch.no_grad():
        ours, theirs = (torch.cat([each(part) for part in images.split(8)]) for each in (model, dense))
    return {
        "cosine": float(F.cosine_similarity(ours, theirs, dim=-1).mean()),
        "agreement": float((ours.argmax(1) == theirs.argmax(1)).double().mean()),
    }


def _timings(
    path: Path, dense: nn.Module | None, images: Tensor, wishes: Wishes, ratio: float, name: str
) -> list[dict[str, Any]]:
    """Medians of alternating forwards on one thread, beside the dense model exported in the same way."""
    with tempfile.TemporaryDirectory(prefix="dge-export-") as aside:
        paths = {"exported": path}
        if dense is not None:
            paths["dense"] = _exported(dense, images, Path(aside), wishes, name).path
        runs = {each: dge_models.open_exported(file, threads=1) for each, file in paths.items()}
        found = []
        for batch in _TIMED if wishes.batch is None else (wishes.batch,):
            pixels = images[torch.arange(batch) % len(images)].contiguous()
            seconds = dge_models.time_runs(runs, pixels, wishes.rounds, threads=1)
            row: dict[str, Any] = {"batch": batch, "threads": 1, "seconds": seconds}
            if dense is not None:
                speedup = seconds["dense"] / seconds["exported"]
                row.update(against_dense=speedup, implied=1 / ratio, share_of_implied=speedup * ratio)
            found.append(row)
    return found
