"""The README's examples run, and its table says what the models have."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import timm
import torch
from small_models import NAMES

from dge_models.macs import model_macs, token_grid

README = Path(__file__).parents[1] / "README.md"


def table_row(name: str) -> str:
    """The model's row, from the model itself."""
    with torch.device("meta"):
        model = timm.create_model(name)
    macs = model_macs(model, token_grid(model, torch.empty(1, 3, 256, 256, device="meta")))
    stages = model.stages if "pvt" in name else [model]
    regions = {"deit": [4 * 4], "pvt": [16 * 16, 8 * 8, 4 * 4, 2 * 2]}["pvt" if "pvt" in name else "deit"]
    fewest = [
        stage.num_prefix_tokens + count for stage, count in zip(stages, regions, strict=True) for _ in stage.blocks
    ]
    coarsest = macs.static
    for layer, routed, queries in zip(macs.layers, macs.routed, fewest, strict=True):
        coarsest -= layer.per_query * (layer.num_tokens - queries) if routed else 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"| `{name}` | {parameters / 1e6:.2f} M | {macs.static / 1e9:.2f} G | {coarsest / 1e9:.2f} G |"


def test_examples_run() -> None:
    failed, attempted = doctest.testfile(str(README), module_relative=False)
    assert attempted > 10
    assert failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_table_is_what_the_models_have(name: str) -> None:
    row = table_row(name)  # behind it stand the measured images per second
    assert any(line.startswith(row) for line in README.read_text(encoding="utf-8").splitlines())


def test_table_lists_no_other_model() -> None:
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == NAMES
