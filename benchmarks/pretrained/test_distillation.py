"""The measurement of distillation, made small: drawn pictures and a tiny model in place of what is downloaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from benchmarks.pretrained import distillation
from benchmarks.pretrained.photographs import small_pictures


def _draw(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(count)
    paths = [folder / f"{index}.png" for index in range(count)]
    for path in paths:
        small = torch.randint(0, 255, (6, 9, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(small.numpy()).resize((90, 60), Image.Resampling.BICUBIC).save(path)
    return paths


def test_pictures_are_kept_small(tmp_path: Path) -> None:
    paths = _draw(tmp_path / "pictures", 2)
    assert [picture.size for picture in small_pictures(paths, 30)] == [(45, 30)] * 2
    assert small_pictures(paths, 600)[0].size == (90, 60)


def test_no_picture_is_in_two_parts() -> None:
    paths = [Path(str(number)) for number in range(25)]
    parts = distillation._parts(paths)
    assert sorted(path for part in parts for path in part) == sorted(paths)
    assert [len(part) for part in parts] == [16, 2, 7]


def test_a_picture_that_comes_twice_is_left_out(tmp_path: Path) -> None:
    paths = _draw(tmp_path / "pictures", 3)
    again = tmp_path / "again.png"
    again.write_bytes(paths[1].read_bytes())
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    assert distillation._distinct(model, [*paths, again], 32) == paths


def test_the_start_and_the_end_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(path: Path, img_size: int) -> Any:
        torch.manual_seed(0)
        settings = {"img_size": img_size, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
        model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **settings).eval()
        for name, parameter in model.named_parameters():  # so that routing has an error
            if name.startswith("blocks") and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    monkeypatch.setattr(distillation, "dinov2_small", small)
    monkeypatch.setattr(distillation, "fetch", lambda folder: (folder, _draw(tmp_path / "others", 4)))
    monkeypatch.setattr(distillation, "fetch_more", lambda folder: _draw(tmp_path / "more", 8))
    monkeypatch.setattr(distillation, "fetch_photographs", lambda folder: _draw(tmp_path / "photographs", 9))
    monkeypatch.setattr(distillation, "packaged_photographs", lambda: _draw(tmp_path / "known", 6))
    monkeypatch.setattr(distillation, "_ALIKE", 2.0)  # a tiny model finds all drawings alike
    output = tmp_path / "result.json"
    arguments = ["--downloads", str(tmp_path), "--output", str(output), "--image-size", "64", "--minutes", "0.05"]
    assert distillation.main([*arguments, "--ratio", "0.8", "--manner", "blocks=0", "varied=false"]) == 0
    tried = tmp_path / "tried.json"
    tried.write_bytes(output.read_bytes())
    assert distillation.main([*arguments, "--ratio", "0.8", "--tried", str(tried)]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    counts = {"learned": 14, "stops": 2, "test_images": 4, "photographs": 3, "other": 4}
    assert {name: len(paths) for name, paths in result["pictures"].items()} == counts
    routed = result["routed"]["photographs"]
    errors = routed.pop("of_each")
    assert result["watched"][0]["photographs"] == routed
    assert [each[0] for each in errors] == result["pictures"]["photographs"]
    assert 1 - sum(each[2] for each in errors) / len(errors) == pytest.approx(routed["token_cosine"], abs=1e-5)
    assert 0 < result["processor_seconds"] < 600
    assert result["distilled"].keys() == {"test_images", "photographs", "other"}
    assert result["distillation"]["curve"][0]["step"] == 0
    steps = [point["step"] for point in result["watched"]]
    assert steps == [point["step"] for point in result["distillation"]["curve"]]
    assert steps[-1] > 0
    assert result["distillation"]["manner"]["blocks"] > 0
    (other,) = result["tried"]
    assert other["command"].endswith("--manner blocks=0 varied=false")
    assert (other["distillation"]["manner"]["blocks"], other["distillation"]["manner"]["varied"]) == (0.0, False)
    assert other["watched"][0]["step"] == 0
    said = capsys.readouterr().out
    assert "14 pictures to learn from, 2 to stop by; held out: 4 test_images, 3 photographs, 4 other" in said
    assert "distilled: test_images 0." in said


@pytest.mark.parametrize("told", ["speed=1", "blocks", "times=many"])
def test_a_manner_that_is_none(told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distillation.main(["--downloads", str(tmp_path), "--manner", told]) != 0
    assert f"--manner: got {told!r}; expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--manner", "flat=1"], "--manner: flat: got 1.0; expected at least 0 and less than 1"),
        (["--pictures", "0"], "--pictures: got 0; expected at least 1"),
        (["--pictures", "-3"], "--pictures: got -3; expected at least 1"),
    ],
)
def test_what_is_out_of_range(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distillation.main(["--downloads", str(tmp_path), *options]) == 1
    assert expected in capsys.readouterr().err
