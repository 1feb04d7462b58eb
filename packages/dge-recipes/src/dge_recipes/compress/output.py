"""The folder that is left: a model that timm loads, the report and the picture; whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

import dge_models
from dge_recipes.errors import UserError
from dge_recipes.new_folder import new_folder

__all__ = ["PICTURE", "REPORT", "write_output"]

REPORT, PICTURE = "report.json", "granularity.png"


def write_output(
    folder: Path, model: nn.Module, name: str, ratio: float, picture: Image.Image, report: Mapping[str, Any]
) -> None:
    """Write everything aside, then rename.

    Args:
        folder: new or empty.
        model: what ``timm.create_model("local-dir:FOLDER", pretrained=True)`` will give.
        name: of the model that it was made from, for errors.
        ratio: its measured mean MAC ratio, for the model's README.
        picture: becomes ``granularity.png``.
        report: becomes ``report.json``.

    Raises:
        UserError: it cannot be written, or the model cannot be saved.
    """
    with new_folder(folder) as made:
        try:
            dge_models.save_pretrained(model, made, ratio=ratio)
        except ValueError as error:
            raise UserError(f"model {name} cannot be saved: {' '.join(str(error).split())}") from error
        picture.save(made / PICTURE)
        (made / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
