"""Weights files and the names of the classes that they know."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dge_recipes.checkpoints.stored_classes import stored_classes, weights_metadata
from dge_recipes.classes import Classes
from dge_recipes.errors import UserError


def _save(path: Path, key: str = "head.weight", rows: int = 2, **metadata: str) -> Path:
    save_file({key: torch.zeros(rows, 3), "norm.weight": torch.zeros(7)}, path, metadata=metadata or None)
    return path


def test_names_make_the_round_trip(tmp_path: Path) -> None:
    names = ("caf\u00e9, large", "strange_\udcff")  # the second holds bytes that are no text
    path = _save(tmp_path / "w.safetensors", **weights_metadata(names, model="x"))
    assert stored_classes(path) == Classes(2, names)
    with safe_open(path, "pt") as file:
        assert (file.metadata()["format"], file.metadata()["model"]) == ("pt", "x")


@pytest.mark.parametrize("key", ["head.weight", "fc.weight", "module.head.weight", "_orig_mod.head.weight"])
def test_files_without_names(tmp_path: Path, key: str) -> None:
    assert stored_classes(_save(tmp_path / "w.safetensors", key)) == Classes(2)
    assert stored_classes(_save(tmp_path / "f.safetensors", key, format="pt")) == Classes(2)
    weights = {key: torch.zeros(2, 3)}
    torch.save({"model": weights, "args": argparse.Namespace(model="x")}, tmp_path / "authors.pth")
    torch.save(weights, tmp_path / "bare.pth")
    assert stored_classes(tmp_path / "authors.pth") == stored_classes(tmp_path / "bare.pth") == Classes(2)


def test_without_a_head_the_names_tell_how_many(tmp_path: Path) -> None:
    assert stored_classes(_save(tmp_path / "w.safetensors", "other.weight")) is None
    named = _save(tmp_path / "n.safetensors", "other.weight", **weights_metadata(["ant"]))
    assert stored_classes(named) == Classes(1, ("ant",))


def test_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=r"w.safetensors name 3 classes, but have 2 outputs"):
        stored_classes(_save(path, **weights_metadata(["a", "b", "c"])))
    for text in ("ant, bee", json.dumps(3)):
        with pytest.raises(UserError, match=r"label_names in its metadata is no list of names"):
            stored_classes(_save(path, label_names=text))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"w.safetensors cannot be loaded: .* is truncated or not a safetensors file"):
        stored_classes(path)
    (tmp_path / "w.pth").write_bytes(b"none")
    for name in ("w.pth", "gone.pth", "gone.safetensors"):
        with pytest.raises(UserError, match=f"{name} cannot be loaded"):
            stored_classes(tmp_path / name)
