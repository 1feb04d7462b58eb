"""Exports are compared with PyTorch before anybody gets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build_small
from torch import Tensor, nn

from dge_models import export, export_model, fix_shapes, open_exported, time_runs

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = build_small(depth=1, global_pool="avg")
    fix_shapes(model, [torch.randn(8, 3, 32, 32)], 0.7)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 32, 32)


def test_onnx_with_a_dynamic_batch(model: Any, images: Tensor, tmp_path: Path) -> None:
    found = export_model(model.train(), images, tmp_path, to="onnx", batch=None)
    assert model.training
    model.eval()
    assert (found.path, found.input_shape, found.output_shape) == (
        tmp_path / "model.onnx",
        (None, 3, 32, 32),
        (None, 7),
    )
    got = found.agreement
    assert (got.pictures, got.tolerance, got.agreement, got.ties) == (5, 1e-4, 1, 0)
    assert 0 < got.largest_difference < 1e-5
    assert got.cosine == pytest.approx(1)
    assert got.batch_difference is not None
    assert got.batch_difference <= 1e-5
    run = open_exported(found.path, threads=1)
    with torch.no_grad():
        for batch in (1, 3, 16):
            pictures = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(run(pictures), model(pictures), atol=1e-5, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_int8_says_how_close_it_is(model: Any, images: Tensor, tmp_path: Path) -> None:
    found = export_model(model, images, tmp_path, to="onnx", batch=2, precision="int8")
    got = found.agreement
    assert (found.input_shape, got.tolerance, got.batch_difference) == ((2, 3, 32, 32), None, None)
    assert 1e-4 < got.largest_difference < 0.5
    assert 0.9 <= got.cosine < 1


class _Wrong(nn.Module):
    """Another output than PyTorch's, as a broken exporter's."""

    def __init__(self, model: nn.Module, wrong: Any) -> None:
        super().__init__()
        self.model, self.wrong = model, wrong

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.wrong(self.model(images))


@pytest.mark.parametrize(
    ("precision", "batch", "wrong", "words"),
    [
        ("fp32", 2, lambda out: out + 1e-3, r"differs from PyTorch's by 0.001 on the pictures given; expected at most"),
        ("fp32", 2, lambda out: out * torch.nan, "outputs that are not finite"),
        ("int8", 2, lambda out: -out, r"in int8 have a mean cosine of -1.000 .*; expected at least 0.9"),
        ("fp32", None, lambda out: out + len(out) * 5e-6, r"differ by 7.5e-05 between batches of \(1, 2, 7, 16\)"),
    ],
)
def test_what_differs_leaves_nothing_behind(
    precision: str,
    batch: int | None,
    wrong: Any,
    words: str,
    model: Any,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "write_exported", lambda *_, **__: None)
    monkeypatch.setattr(export, "open_exported", lambda _: _Wrong(model, wrong))
    with pytest.raises(ValueError, match=words):
        export_model(model, images, tmp_path, to="onnx", batch=batch, precision=precision)
    assert list(tmp_path.iterdir()) == []


class _Jumping(nn.Module):
    """Says 1 where the sum of the pixels is positive, else 0: rounding decides of pictures whose sum is zero."""

    def forward(self, images: Tensor) -> Tensor:
        return (images.sum((1, 2, 3), keepdim=False) > 0).float()[:, None] + torch.tensor([0.0, 2.0])


def test_pictures_that_tie_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.ones(3, 3, 4, 4)
    images[1] = 0
    monkeypatch.setattr(export, "write_exported", lambda *_, **__: None)
    monkeypatch.setattr(export, "open_exported", lambda _: lambda x: _Jumping()(x + 1e-7))
    found = export_model(_Jumping(), images, tmp_path, to="onnx", batch=1).agreement
    assert (found.ties, found.largest_difference) == (1, 0)
    with pytest.raises(ValueError, match="the regions of all 1 pictures score alike"):
        export_model(_Jumping(), images[1:2], tmp_path, to="onnx", batch=1)
    monkeypatch.setattr(export, "open_exported", lambda _: lambda x: 1 - _Jumping()(x))
    with pytest.raises(ValueError, match="differs from PyTorch's by"):
        export_model(_Jumping(), images[:1], tmp_path, to="onnx", batch=1)


def test_bad_input(model: Any, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch: got 0; expected at least 1, or None"):
        export_model(model, images, tmp_path, to="onnx", batch=0)
    with pytest.raises(ValueError, match=r"images: got shape \(0, 3, 32, 32\); expected \[P, C, H, W\]"):
        export_model(model, images[:0], tmp_path, to="onnx")
    with pytest.raises(ValueError, match=r"batch: got a dynamic one for pt2"):
        export_model(model, images, tmp_path, to="pt2", batch=None)


def test_runs_are_timed_in_turns(images: Tensor) -> None:
    called: list[str] = []

    def run(name: str) -> Any:
        return lambda _: called.append(f"{name}{torch.get_num_threads()}")

    before = torch.get_num_threads()
    seconds = time_runs({"a": run("a"), "b": run("b")}, images, 3, threads=1)
    assert called == ["a1", "b1"] * 5
    assert torch.get_num_threads() == before
    assert all(0 <= each < 1 for each in seconds.values())
