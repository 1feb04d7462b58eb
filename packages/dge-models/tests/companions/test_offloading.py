"""accelerate's offloading: weights are fetched when a layer is called, and the results stay what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from companion import companion
from layer_pairs import KINDS, assert_same, assert_same_fixed, images, pair
from small_models import build_small

from dge_models import count_macs, from_timm, mean_counts, set_budget, set_fixed_queries, trace

accelerate = companion("accelerate")

every_kind = pytest.mark.parametrize("kind", KINDS)
every_name = pytest.mark.parametrize("name", ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256"])


@every_kind
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_an_offloaded_model_computes_what_the_plain_one_does(kind: str, to: str, tmp_path: Path) -> None:
    plain, routed = pair(kind)
    if to == "cpu":
        accelerate.cpu_offload(routed, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(routed, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in routed.parameters())
    assert_same(plain, routed, images(kind))


@every_kind
def test_fixed_queries_set_before_offloading(kind: str) -> None:
    plain, routed = pair(kind)
    set_fixed_queries(routed, 1.0)
    accelerate.cpu_offload(routed, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(routed(images(kind)), plain(images(kind)), atol=1e-5, rtol=0)
    assert_same_fixed(routed, plain(images(kind)), images(kind))


@every_name
def test_the_tools_take_an_offloaded_model(name: str) -> None:
    model, pixels = build_small(name), images(name[:3])
    expected, macs, counts = trace(model, pixels), count_macs(model, pixels), mean_counts(model, [pixels])
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    got = trace(model, pixels)
    torch.testing.assert_close(got.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(got.granularity, expected.granularity, strict=True))
    assert torch.equal(count_macs(model, pixels).total, macs.total)
    assert mean_counts(model, [pixels]) == counts
    with pytest.raises(ValueError, match=r"set the budget before .* offloading the gates"):
        set_budget(model, 0.6, [pixels])


def test_an_offloaded_model_is_not_converted() -> None:
    plain, _ = pair("deit")
    accelerate.cpu_offload(plain, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"whose forward is replaced, .*; convert first and offload afterwards"):
        from_timm(plain)
