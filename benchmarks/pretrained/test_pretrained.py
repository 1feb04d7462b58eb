"""The measurement, made small: drawn pictures and a tiny model in place of what is downloaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks.pretrained import __main__ as pretrained
from benchmarks.pretrained import save
from benchmarks.pretrained.photographs import load_photographs


def _draw(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    generator = np.random.default_rng(len(folder.name))
    paths = [folder / f"{index}.png" for index in range(count)]
    for path in paths:
        small = generator.integers(0, 255, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(small).resize((90, 60), Image.Resampling.BICUBIC).save(path)
    return paths


def test_photographs_are_cropped_and_normalised(tmp_path: Path) -> None:
    paths = _draw(tmp_path / "pictures", 2)
    assert load_photographs(paths, 32).shape == (2, 3, 32, 32)
    crops = load_photographs(paths, 32, crops=3)
    assert crops.shape == (6, 3, 32, 32)
    assert not torch.equal(crops[0], crops[2])


def test_every_method_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(path: Path, img_size: int) -> Any:
        torch.manual_seed(0)
        settings = {"img_size": img_size, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
        return timm.create_model("vit_small_patch14_dinov2", num_classes=0, **settings).eval()

    monkeypatch.setattr(pretrained, "dinov2_small", small)
    monkeypatch.setattr(pretrained, "fetch", lambda folder: (folder, _draw(tmp_path / "unseen", 4)))
    monkeypatch.setattr(pretrained, "packaged_photographs", lambda: _draw(tmp_path / "known", 6))
    output = tmp_path / "result.json"
    arguments = ["--downloads", str(tmp_path), "--output", str(output), "--image-size", "64"]
    assert pretrained.main([*arguments, "--ratios", "0.8", "0.01", "--batches", "2", "--rounds", "1"]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in result["rows"]}
    assert rows.keys() == {"merge", "merge_constant", "merge_published", "route_21", "route_421"}
    assert all(0.5 < row["ratio"] <= 1.01 and row["token_cosine"] > 0.5 for row in rows.values())
    assert all(row["speed"]["2"] > 0 for row in rows.values())
    assert result["test_photographs"] == 4
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if line.startswith("| merge | 0.80 |")]) == 1
    assert any("ratio: got 0.01" in line for line in said)


def test_what_the_commands_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=0)
    monkeypatch.setattr(save, "dinov2_small", lambda path: model)
    monkeypatch.setattr(save, "fetch", lambda folder: (folder, _draw(tmp_path / "unseen", 2)))
    monkeypatch.setattr(save, "packaged_photographs", lambda: _draw(tmp_path / "known", 3))
    output = tmp_path / "out"
    assert save.main(["--downloads", str(tmp_path), "--output", str(output)]) == 0
    loaded = timm.create_model(f"local-dir:{output / 'model'}", pretrained=True)
    assert torch.equal(loaded.get_parameter("pos_embed"), model.get_parameter("pos_embed"))
    counts = [len(list((output / name).iterdir())) for name in ("calibration", "wallpapers")]
    assert counts == [3, 2]
    assert save.main(["--downloads", str(tmp_path), "--output", str(output)]) == 1
    assert f"--output {output} exists" in capsys.readouterr().err
