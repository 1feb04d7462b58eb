"""Blocks and models that merge: costs, export, gradients and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_models import build_plain, partly_plain_images

from dge_models import count_macs, merge_tokens
from dge_models.merge_tokens import merging_like


def test_macs_agree_with_the_layers() -> None:
    model, images = build_plain(), partly_plain_images(batch=2)
    merged = merging_like(model, counts=[10, 20, 0, 30])
    tokens, expected = 145, 0.0
    for count in (10, 20, 0, 30):
        before, tokens = tokens, tokens - count
        expected += before * (32 + 4 * 32 * 32) + before * before * (2 * 32 + 3 * 2)
        expected += ((before - 1) / 2) ** 2 * 16 if count else 0
        expected += tokens * (32 + 8 * 32 * 32 + 4 * 32)
    count_ = count_macs(merged, images)
    plain = count_macs(model, images)
    assert count_.layers.sum(0).tolist() == [expected, expected]
    assert count_.static_layers.tolist() == plain.static_layers.tolist()
    assert float(count_.total[0]) - expected == plain.static_total - float(plain.static_layers.sum())


def test_constant_counts_export_with_any_batch() -> None:
    merged: Any = merge_tokens(build_plain("average"), 0.7, adaptive=False)
    images = partly_plain_images("average")
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(merged, (images[:3],), dynamic_shapes={"x": {0: batch}})
    assert not [node for node in program.graph.nodes if "dge_kernels" in str(node.target)]
    torch.testing.assert_close(program.module()(images), merged(images), atol=1e-5, rtol=1e-5)


def test_compilation() -> None:
    images = partly_plain_images()
    constant = merge_tokens(build_plain(), 0.75, adaptive=False)
    adaptive = merge_tokens(build_plain(), 0.75, [images])
    with torch.no_grad():
        for model, whole in ((constant, True), (adaptive, False)):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)
            torch.testing.assert_close(compiled(images), model(images))
            torch.testing.assert_close(compiled(images[:4]), model(images[:4]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(checkpointing: bool) -> None:
    images = partly_plain_images("map")
    merged: Any = merge_tokens(build_plain("map", drop_path_rate=0.2), 0.75, [images])
    merged.train().set_grad_checkpointing(checkpointing)
    merged(images).square().sum().backward()
    assert [name for name, parameter in merged.named_parameters() if parameter.grad is None] == []


def test_autocast_and_half_precision() -> None:
    model, images = build_plain(), partly_plain_images()
    merged = merge_tokens(model, 0.8, [images])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert merged(images).isfinite().all()
    half = merged.bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    merged64 = merge_tokens(build_plain().double(), 0.8, [images.double()])
    assert merged64(images.double()).dtype == torch.float64
