"""OpenVINO runs what is exported to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from companion import companion
from small_models import build_small

from dge_models import export_model, open_exported, set_fixed_queries

companion("openvino")
companion("onnxscript")


@pytest.mark.parametrize(("precision", "batch"), [("fp32", None), ("fp16", 2)])
def test_exported_models_compute_what_pytorch_does(precision: str, batch: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_small(depth=1, global_pool="avg")
    set_fixed_queries(model, 0.7)
    images = torch.randn(4, 3, 32, 32)
    found = export_model(model, images, tmp_path, to="openvino", batch=batch, precision=precision)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert found.agreement.agreement == 1
    assert found.agreement.tolerance == (1e-4 if precision == "fp32" else None)
    run = open_exported(found.path, threads=1)
    with torch.no_grad():
        for count in (1, 3) if batch is None else (batch,):
            expected = model(images[:count])
            torch.testing.assert_close(
                run(images[:count]), expected, atol=1e-5 if precision == "fp32" else 1e-2, rtol=0
            )
