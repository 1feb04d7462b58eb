"""The folder appears whole or not at all."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from small_models import small_vit

from dge_recipes.compress.output import write_output
from dge_recipes.errors import UserError

_PICTURE = Image.new("RGB", (4, 4))


def test_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_output(tmp_path / "empty", small_vit(), "m", 0.5, _PICTURE, {"a": 1})
    names = {path.name for path in (tmp_path / "empty").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "report.json", "granularity.png"}


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_output(tmp_path / "out", small_vit(), "m", 0.5, _PICTURE, {"a": object()})
    model = small_vit()
    model.head = torch.nn.Sequential(model.head)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"model m cannot be saved: .*"):
        write_output(tmp_path / "out", model, "m", 0.5, _PICTURE, {})
    assert list(tmp_path.iterdir()) == []
