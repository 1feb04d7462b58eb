from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import dge_models

SOURCE = Path(str(files(dge_models)))


def test_public_names_exist_and_are_sorted() -> None:
    assert dge_models.__all__ == sorted(dge_models.__all__)
    assert all(hasattr(dge_models, name) for name in dge_models.__all__)


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+(\.\w+)*(\+\w+)?", dge_models.__version__)


def test_types_are_shipped() -> None:
    assert (SOURCE / "py.typed").is_file()


def test_every_module_has_its_test() -> None:
    modules = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert modules <= tests
