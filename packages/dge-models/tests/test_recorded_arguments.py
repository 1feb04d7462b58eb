"""What timm finds when it saves a model."""

from __future__ import annotations

from typing import Any

import torch
from plain_models import build_plain
from torch import nn

from dge_models import from_timm, merge_tokens, set_merge_counts
from dge_models.recorded_arguments import record_base


def test_the_arguments_are_those_of_now() -> None:
    routed: Any = from_timm(build_plain(), splits=(2, 1))
    assert routed.pretrained_cfg["architecture"] == "dge_vit"
    assert routed._model_args["base"] == "deit_tiny_patch16_224"
    assert routed._model_args["splits"] == [2, 1]
    routed._model_args = {"splits": (4, 2, 1), "depth": 4}
    assert routed._model_args["splits"] == [2, 1]
    assert routed._model_args["depth"] == 4
    merged: Any = merge_tokens(build_plain(), 0.9, adaptive=False)
    set_merge_counts(merged, [1, 2, 3, 4])
    assert merged._model_args["merge_counts"] == [1, 2, 3, 4]


def test_a_model_that_timm_does_not_know_has_no_base() -> None:
    module = nn.Linear(1, 1)
    record_base(module)
    assert not hasattr(module, "base_architecture")
    assert torch.equal(module(torch.zeros(1, 1)), module.bias.unsqueeze(0))
