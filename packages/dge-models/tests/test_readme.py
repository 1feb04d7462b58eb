"""The README's examples run, and its table says what the models have."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import timm
import torch

from dge_models.macs import model_macs
from dge_models.vit import routed_blocks

README = Path(__file__).parents[1] / "README.md"
NAMES = [
    f"{family.format(size)}_patch16_256"
    for family in ("deit_{}", "deit_dge_s124_{}", "deit_dge_s124_{}_distilled")
    for size in ("tiny", "small", "base")
]


def table_row(name: str) -> str:
    """The model's row, from the model itself."""
    with torch.device("meta"):
        model = timm.create_model(name)
    macs = model_macs(model, model.patch_embed.grid_size)
    coarsest = macs.static
    for layer, block in zip(macs.layers, model.blocks, strict=True):
        if routed_blocks(block):
            coarsest -= layer.per_query * (layer.num_tokens - model.num_prefix_tokens - 4 * 4)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"| `{name}` | {parameters / 1e6:.2f} M | {macs.static / 1e9:.2f} G | {coarsest / 1e9:.2f} G |"


def test_examples_run() -> None:
    failed, attempted = doctest.testfile(str(README), module_relative=False)
    assert attempted > 10
    assert failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_table_is_what_the_models_have(name: str) -> None:
    assert table_row(name) in README.read_text(encoding="utf-8").splitlines()


def test_table_lists_every_registered_model() -> None:
    assert sorted(NAMES) == sorted(timm.list_models(module="dge_deit"))
