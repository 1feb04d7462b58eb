from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import safetensors
import timm
import torch
from packaging.version import Version
from small_models import NAMES, SMALL, build_small, scatter_routing
from timm.models import push_to_hf_hub as timm_push
from timm.models import save_for_hf

from dge_models import (
    from_timm,
    push_to_hf_hub,
    save_pretrained,
    set_budget,
    set_dynamic_queries,
    set_fixed_queries,
    set_training_mode,
    weights_metadata,
)
from dge_models.routed import routed_blocks

BASE = "deit3_small_patch16_224"
LOAD = """
import sys, timm, torch, dge_models
folder = sys.argv[1]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
images = torch.load(f"{folder}.images")
with torch.no_grad():
    fixed = model(images)
    dge_models.set_dynamic_queries(model)
    torch.save((fixed, model(images), model.pretrained_cfg), f"{folder}.out")
"""
records_arguments = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.31"), reason="this timm saves no arguments of its own accord"
)


def converted(**kwargs: Any) -> Any:
    """A small converted model in which all splits occur."""
    settings = {"img_size": 96, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5, **kwargs}
    return scatter_routing(from_timm(timm.create_model(BASE, **settings), splits=(2, 1), layers=[0, 2])).eval()


def load(folder: Path, **kwargs: Any) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def test_a_new_process_gets_the_converted_model_back(tmp_path: Path) -> None:
    plain = timm.create_model(BASE, img_size=192, num_classes=5)
    model = scatter_routing(from_timm(plain, splits=(2, 1), layers=[2, 3, 5])).eval()
    images = torch.randn(2, 3, 192, 192)
    set_budget(model, 0.92, [images])
    with torch.no_grad():
        dynamic = model(images)
        set_fixed_queries(model, 0.9)
        fixed = model(images)
    assert not torch.equal(dynamic, fixed)
    names = ["ant", "bee", "cat", "dog", "eel"]
    save_pretrained(model, tmp_path / "saved", label_names=names)
    torch.save(images, tmp_path / "saved.images")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "saved")], check=True)
    loaded_fixed, loaded_dynamic, config = torch.load(tmp_path / "saved.out")
    assert torch.equal(loaded_fixed, fixed)
    assert torch.equal(loaded_dynamic, dynamic)
    assert config["label_names"] == names
    assert tuple(config["input_size"]) == (3, 192, 192)
    assert all(tuple(config[key]) == tuple(plain.pretrained_cfg[key]) for key in ("mean", "std"))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"in_chans": 1, "img_size": (96, 64)},
        {"dynamic_img_size": True},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2, "qk_norm": True},
        {"patch_size": 8, "mlp_ratio": 3},
        {"num_classes": 0},
    ],
)
def test_arguments_of_the_plain_model_come_back(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    model = converted(**kwargs)
    set_training_mode(model, "sparse")
    save_pretrained(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    size = kwargs.get("img_size", 96)
    images = torch.randn(2, kwargs.get("in_chans", 3), *(size if isinstance(size, tuple) else (size, size)))
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert type(loaded) is type(model)
    assert {(b.training_mode, b.drop_path_mode) for b in routed_blocks(loaded)} == {("sparse", "image")}
    assert tuple(timm.data.resolve_model_data_config(loaded)["input_size"]) == tuple(images.shape[1:])


def test_what_changed_after_the_conversion_is_saved(tmp_path: Path) -> None:
    model = converted(dynamic_img_size=True)
    model.reset_classifier(4, "avg")
    model.set_input_size((64, 96))
    set_fixed_queries(model, 0.85, image_size=(48, 64))
    save_pretrained(model, tmp_path / "saved")
    loaded, images = load(tmp_path / "saved"), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    set_dynamic_queries(model)
    save_pretrained(model, tmp_path / "saved")
    loaded, images = load(tmp_path / "saved"), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    again = tmp_path / "again"
    save_pretrained(loaded, again)
    assert (again / "config.json").read_text() == (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_registered_names_are_saved_under_their_names(tmp_path: Path, name: str) -> None:
    model = build_small(name)
    images = torch.randn(2, 3, *((64, 64) if "pvt" in name else (32, 32)))
    if "dge" in name:
        set_fixed_queries(model, 0.7)
    save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architecture"] == name
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(images), model(images))


def test_a_loaded_model_takes_other_arguments(tmp_path: Path) -> None:
    model = converted()
    set_fixed_queries(model, 0.8)
    save_pretrained(model, tmp_path / "saved")
    other = load(tmp_path / "saved", num_classes=3, fixed_counts=())
    assert other.head.out_features == 3
    assert all(block.fixed_layout is None for block in routed_blocks(other))
    assert torch.equal(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    larger = load(tmp_path / "saved", img_size=128, fixed_counts=())
    assert larger(torch.randn(1, 3, 128, 128)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"fixed_counts: .* add up to 16, .*fixed_counts=\(\) leaves"):
        load(tmp_path / "saved", img_size=128)
    maps = load(tmp_path / "saved", features_only=True, out_indices=(0, 1))(torch.randn(1, 3, 96, 96))
    assert [tuple(part.shape) for part in maps] == [(1, 32, 6, 6)] * 2


@pytest.mark.parametrize(
    "name", [None, "deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256", "dpvt_dge_s124_tiny_256"]
)
def test_other_splits_than_those_of_the_weights_are_refused(tmp_path: Path, name: str | None) -> None:
    model = converted() if name is None else build_small(name)
    own = routed_blocks(model)[0].router.splits
    save_pretrained(model, tmp_path / "saved")
    other = tuple(2 * k for k in own)
    with pytest.raises(ValueError, match=r"splits: got .*; expected .*, with which the weights were trained"):
        load(tmp_path / "saved", splits=other)
    fresh = timm.create_model(f"local-dir:{tmp_path / 'saved'}", splits=other)
    assert {block.router.splits for block in routed_blocks(fresh)} == {other}


def test_the_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    folder = tmp_path / "deep" / "saved"
    save_pretrained(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == ["README.md", "config.json", "model.safetensors"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space"):
            save_pretrained(scatter_routing(model, seed=2), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]
    save_pretrained(model, folder)
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert list(folder.parent.iterdir()) == [folder]
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_folders_with_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all there is")
    with pytest.raises(ValueError, match=r"holds thesis\.tex; expected a new or empty folder"):
        save_pretrained(converted(), tmp_path)
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        save_pretrained(converted(), tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "all there is"


def test_names_of_classes_are_kept_or_refused(tmp_path: Path) -> None:
    model = converted(num_classes=2)
    with pytest.raises(ValueError, match="label_names: got 3; expected one per class, 2"):
        save_pretrained(model, tmp_path / "saved", label_names=["a", "b", "c"])
    save_pretrained(model, tmp_path / "saved", label_names=("a", "b"))
    loaded = load(tmp_path / "saved")
    save_pretrained(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["label_names"] == ["a", "b"]
    loaded.reset_classifier(3)
    save_pretrained(loaded, tmp_path / "again")
    assert "label_names" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_wrappers_that_add_nothing_are_looked_through(tmp_path: Path) -> None:
    model, images = converted(), torch.randn(1, 3, 96, 96)
    wrapped = torch.nn.DataParallel(model)
    save_pretrained(torch._dynamo.OptimizedModule(wrapped, torch._dynamo.disable), tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(images), model(images))


def test_metadata_say_what_the_weights_are_for(tmp_path: Path) -> None:
    model = converted()
    save_pretrained(model, tmp_path / "saved", label_names=list("abcde"))
    with safetensors.safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata == weights_metadata(model, "abcde")
    assert metadata == {"format": "pt", "splits": "[2, 1]", "label_names": '["a", "b", "c", "d", "e"]'}
    assert weights_metadata(timm.create_model("deit_tiny_patch16_256", **SMALL)) == {"format": "pt"}


class Hub:
    """Stands for the hub's interface; what is uploaded lands in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, **_: Any) -> Hub:
        return self

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def file_exists(self, *, repo_id: str, filename: str, revision: str | None) -> bool:
        return (self.folder / repo_id / filename).exists()

    def upload_folder(self, *, repo_id: str, folder_path: Any, commit_message: str, **_: Any) -> str:
        target = self.folder / repo_id
        target.mkdir(parents=True, exist_ok=True)
        for path in Path(folder_path).iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return commit_message


def test_models_are_pushed_to_a_hub_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(tmp_path))
    model, images = converted(), torch.randn(1, 3, 96, 96)
    assert push_to_hf_hub(model, "routed", ratio=0.875) == "Add model"
    page = tmp_path / "me" / "routed"
    assert "0.875" in (page / "README.md").read_text()
    (page / "README.md").write_text("mine")
    push_to_hf_hub(model, "routed", commit_message="again")
    assert (page / "README.md").read_text() == "mine"

    def download(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == "me/routed"
        return str(page / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    loaded = timm.create_model("hf-hub:me/routed", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


@records_arguments
def test_timms_own_functions_save_converted_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = converted(), torch.randn(1, 3, 96, 96)
    set_fixed_queries(model, 0.8)
    model.reset_classifier(3)
    save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    monkeypatch.setattr("timm.models._hub.HfApi", Hub(tmp_path))
    timm_push(model, "routed")
    for folder in (tmp_path / "saved", tmp_path / "me" / "routed"):
        with torch.no_grad():
            assert torch.equal(load(folder)(images), model(images))
    set_dynamic_queries(model)
    save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(images), model(images))


def test_a_folder_without_arguments_is_refused(tmp_path: Path) -> None:
    save_pretrained(converted(), tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    del config["model_args"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"base: got None; expected the registered name .* written without model_args"):
        load(tmp_path / "saved")
