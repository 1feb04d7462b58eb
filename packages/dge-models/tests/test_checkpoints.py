from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from golden import Golden, Trap, reference_weights
from small_models import SMALL, SMALL_PYRAMID, Build

from dge_models import from_timm, load_checkpoint, read_checkpoint, weights_metadata

SPLIT = "blocks.0.dge.splits"
PVT = "pvt_dge_s124_tiny_256"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_own_weights_round_trip(small: Build, tmp_path: Path, suffix: str) -> None:
    source, target = small(), timm.create_model("deit_dge_s124_tiny_patch16_256", **SMALL)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    load_checkpoint(target, path)
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_prefixes_and_averaged_weights(golden_dge: Golden, tmp_path: Path, prefix: str) -> None:
    averaged = {f"{prefix}{key}": value * 2 for key, value in golden_dge.weights.items() if "splits" not in key}
    path = golden_dge.save(tmp_path / "reference.pth", model_ema=averaged)
    model = timm.create_model(golden_dge.model)
    load_checkpoint(model, path)
    assert torch.equal(model.norm.weight, golden_dge.weights["norm.weight"])
    load_checkpoint(model, path, use_ema=True)
    assert torch.equal(model.norm.weight, golden_dge.weights["norm.weight"] * 2)


def test_reading_keeps_everything_in_the_file(golden_dge: Golden, tmp_path: Path) -> None:
    content = read_checkpoint(golden_dge.save(tmp_path / "reference.pth"))
    assert content["epoch"] == 299
    assert isinstance(content["args"], argparse.Namespace)
    assert content["args"].model == golden_dge.model
    assert content["model"].keys() == golden_dge.weights.keys()


@pytest.mark.parametrize("whole", [False, True])
def test_names_and_shapes_are_told_without_the_tensors(tmp_path: Path, whole: bool) -> None:
    path, weights = tmp_path / "w.pth", {"head.weight": torch.arange(12.0).reshape(3, 4)}
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=not whole)  # whole: as torch before 1.6 did
    found = read_checkpoint(path, mmap=True)["model"]["head.weight"]
    assert torch.equal(found, weights["head.weight"])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"w\.pth is truncated or not a PyTorch checkpoint"):
        read_checkpoint(path, mmap=True)


def test_code_in_a_pickle_never_runs(small: Build, tmp_path: Path) -> None:
    path, created = tmp_path / "trap.pth", tmp_path / "created"
    torch.save({"model": small().state_dict(), "args": Trap(created)}, path)
    with pytest.raises(ValueError, match=r"holds a posix\.mkdir; expected tensors"):
        load_checkpoint(small(), path)
    assert not created.exists()


def test_position_embedding_is_resized_with_its_prefix_kept(small: Build, tmp_path: Path) -> None:
    source, target = small(img_size=32), small(img_size=(24, 40))
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    load_checkpoint(target, tmp_path / "weights.pth")
    grid = source.pos_embed[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, (6, 10), mode="bicubic", align_corners=False)
    torch.testing.assert_close(target.pos_embed[:, 1:], resized.flatten(2).transpose(1, 2))
    assert torch.equal(target.pos_embed[:, :1], source.pos_embed[:, :1])


def test_a_converted_model_takes_the_authors_weights(golden_dge: Golden, tmp_path: Path) -> None:
    converted = from_timm(timm.create_model("deit_tiny_patch16_224", img_size=256)).eval()
    converted.load_state_dict(golden_dge.weights)
    with torch.no_grad():
        logits = converted(golden_dge.images[:1])
    torch.testing.assert_close(logits, golden_dge.tensor("logits")[:1], atol=5e-5, rtol=0)


def test_another_head_is_an_error_unless_it_is_to_be_reset(small: Build, tmp_path: Path) -> None:
    source, target = small(num_classes=9), small()
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    head = target.head.weight.clone()
    with pytest.raises(ValueError, match=r"head.weight is \(9, 32\), expected \(7, 32\).*reset_head=True"):
        load_checkpoint(target, tmp_path / "weights.pth")
    load_checkpoint(target, tmp_path / "weights.pth", reset_head=True)
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.norm.weight, source.norm.weight)
    target.reset_classifier(0)
    load_checkpoint(target, tmp_path / "weights.pth", reset_head=True)


def test_a_checkpoint_of_another_model_is_one_error_and_changes_nothing(small: Build, tmp_path: Path) -> None:
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pvt = reference_weights("pvt_dge_s124_tiny_256", 3)
    path = tmp_path / "pvt.pth"
    torch.save({"model": pvt, "args": argparse.Namespace(model="pvt_dge_s124_tiny_256")}, path)
    with pytest.raises(
        ValueError, match=r"pvt\.pth \(of pvt_dge_s124_tiny_256\) doesn't fit: it holds a pyramid \(PVT"
    ):
        load_checkpoint(model, path)
    torch.save({"model": small(embed_dim=16).state_dict()}, path)
    with pytest.raises(ValueError, match=r"pvt\.pth doesn't fit DGEVisionTransformer: cls_token is \(1, 1, 16\), exp"):
        load_checkpoint(model, path)
    torch.save({"model": {key: value for key, value in before.items() if "norm" not in key}}, path)
    with pytest.raises(ValueError, match=r"doesn't fit DGEVisionTransformer: missing .* and \d+ more$"):
        load_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_splits_are_an_error(golden_dge: Golden, tmp_path: Path) -> None:
    path = golden_dge.save(tmp_path / "reference.pth")
    model = timm.create_model(golden_dge.model, splits=(4, 1))
    with pytest.raises(ValueError, match=r"splits are \(4, 2, 1\); expected the model's, \(4, 1\)"):
        load_checkpoint(model, path)


def test_an_unsquare_position_embedding_is_an_error(small: Build, tmp_path: Path) -> None:
    torch.save({"model": small(img_size=(24, 40)).state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="position embedding of 61 tokens; expected 65"):
        load_checkpoint(small(), tmp_path / "weights.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
def test_truncated_files_are_one_error(small: Build, tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": small().state_dict()}, path)
    else:
        safetensors.torch.save_file(small().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ValueError, match=f"weights{suffix} is truncated or not a"):
        load_checkpoint(small(), path)


@pytest.mark.parametrize(
    ("content", "use_ema", "reason"),
    [
        ([torch.zeros(1)], False, "holds a list; expected a dict of weights"),
        ({}, False, "holds a dict; expected a dict of weights"),
        (
            {"epoch": 3, "optimizer": {}},
            False,
            "has no weights under model or state_dict; it has epoch, optimizer",
        ),
        ({"model": {"a": 3}}, False, "has no weights under model"),
        ({"model": {"a": torch.zeros(1)}}, True, "has no EMA weights under model_ema or state_dict_ema"),
    ],
)
def test_files_without_weights_are_an_error(
    small: Build, tmp_path: Path, content: Any, use_ema: bool, reason: str
) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=reason):
        load_checkpoint(small(), tmp_path / "file.pth", use_ema)


def test_a_missing_file_is_an_error(small: Build, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at .*nothing\.pth"):
        load_checkpoint(small(), tmp_path / "nothing.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pyramids_own_weights_round_trip(small: Build, tmp_path: Path, suffix: str) -> None:
    source, target = small(PVT), timm.create_model(PVT, **SMALL_PYRAMID)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    load_checkpoint(target, path)
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_a_pyramids_prefixes_and_averaged_weights(golden_pvt: Golden, tmp_path: Path, prefix: str) -> None:
    weights = {f"{prefix}{key}": value for key, value in golden_pvt.weights.items()}
    averaged = {f"{prefix}{key}": value * 2 for key, value in golden_pvt.weights.items() if "splits" not in key}
    path = tmp_path / "reference.pth"
    torch.save({"model": weights, "model_ema": averaged, "args": argparse.Namespace(model=golden_pvt.model)}, path)
    model = timm.create_model(golden_pvt.model)
    for factor in (1, 2):
        load_checkpoint(model, path, use_ema=factor == 2)
        assert torch.equal(model.stages[3].cls_token, golden_pvt.weights["cls_token"] * factor)
        query = model.stages[1].blocks[1].attn.q.weight
        assert torch.equal(query, golden_pvt.weights["block2.1.attn.q.weight"] * factor)


def test_a_pyramids_positions_are_resized_bilinearly(small: Build, tmp_path: Path) -> None:
    source, target = small(PVT), small(PVT, img_size=(96, 64))
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    load_checkpoint(target, tmp_path / "weights.pth")
    images = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(target(images), source(images))
    assert torch.equal(target.stages[3].pos_embed[:, :1], source.stages[3].pos_embed[:, :1])


def test_a_pyramids_head_can_be_kept(small: Build, tmp_path: Path) -> None:
    source, target = small(PVT, num_classes=9), small(PVT)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"head.weight is \(9, 32\), expected \(7, 32\).*reset_head=True"):
        load_checkpoint(target, tmp_path / "weights.pth")
    load_checkpoint(target, tmp_path / "weights.pth", reset_head=True)
    assert torch.equal(target.stages[0].pos_embed, source.stages[0].pos_embed)


def test_a_pyramid_refuses_a_deits_weights(small: Build, tmp_path: Path) -> None:
    torch.save({"model": small().state_dict()}, tmp_path / "deit.pth")
    with pytest.raises(ValueError, match=r"deit\.pth doesn't fit: it holds a vision transformer without stages"):
        load_checkpoint(small(PVT), tmp_path / "deit.pth")
    with pytest.raises(ValueError, match="state_dict: doesn't fit: it holds a vision transformer without stages"):
        small(PVT).load_state_dict(small().state_dict())
    with pytest.raises(ValueError, match=r"state_dict: doesn't fit: it holds a pyramid \(PVT\)"):
        small().load_state_dict(small(PVT).state_dict())


def test_timms_own_pyramids_are_not_taken_for_ours(tmp_path: Path) -> None:
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), num_classes=3)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    load_checkpoint(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), num_classes=3), tmp_path / "weights.pth")


def test_positions_of_a_model_without_a_family_are_resized_too(tmp_path: Path) -> None:
    def create(size: int) -> torch.nn.Module:
        return timm.create_model("eva02_tiny_patch14_224", img_size=size, depth=1, num_classes=3)

    stored, model = create(56), create(84)
    torch.save(stored.state_dict(), tmp_path / "eva.pth")
    load_checkpoint(model, tmp_path / "eva.pth")
    assert model.pos_embed.shape == (1, 1 + 6 * 6, 192)
    assert torch.equal(model.pos_embed[:, 0], stored.pos_embed[:, 0])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_of_other_splits_are_refused(small: Build, tmp_path: Path, suffix: str) -> None:
    model, path = small(layers=[0, 2]), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), path, metadata=weights_metadata(model))
    else:
        torch.save({"model": model.state_dict()} if suffix == ".pth" else model.state_dict(), path)
    load_checkpoint(small(layers=[0, 2]), path)
    other = small(layers=[0, 2], splits=(8, 4, 2))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"its splits are \(4, 2, 1\); expected the model's, \(8, 4, 2\)"):
        load_checkpoint(other, path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with pytest.raises(
        RuntimeError, match=r"blocks.0.router: the weights' splits are \(4, 2, 1\); expected \(8, 4, 2\)"
    ):
        other.load_state_dict(model.state_dict())


def test_splits_that_are_no_splits_are_refused(small: Build, tmp_path: Path) -> None:
    model, path = small(), tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path, metadata={"splits": "four"})
    with pytest.raises(ValueError, match="has splits 'four' in its metadata; expected JSON of a split set"):
        load_checkpoint(model, path)
