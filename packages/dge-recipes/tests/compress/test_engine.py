"""From a model and pictures to cheaper copies."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import draw_pictures, small_vit
from torch import Tensor, nn

import dge_models
from dge_recipes.compress.engine import compress
from dge_recipes.compress.pictures import Pictures, pictures_section, read_pictures
from dge_recipes.compress.source import Dense
from dge_recipes.compress.wishes import Wishes
from dge_recipes.errors import UserError

_CPU = torch.device("cpu")
_VIEW = {"image_size": 64, "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    section = pictures_section(draw_pictures(tmp_path, 32), _VIEW, ("data.held_out=0.5",))
    return read_pictures(section, batch_size=8, limit=50)


def test_both_methods_reach_the_ratio_and_leave_the_dense_model_alone(pictures: Pictures) -> None:
    model = small_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines: list[str] = []
    found = compress(Dense("m", model, _VIEW), pictures, Wishes(0.7), _CPU, lines.append)
    assert [each.method for each in found.results] == ["dense", "merge", "route"]
    assert [each.fidelity.mac_ratio for each in found.results] == pytest.approx([1, 0.7, 0.7], abs=0.08)
    assert all(0.5 < each.fidelity.class_cosine < 1.0001 for each in found.results)
    assert found.choice.method in {"merge", "route"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [line.split(":")[0] for line in lines[:2]] == ["merge", "route"]
    assert lines[2].startswith("measuring on 16 held-out pictures")
    rows = found.table.splitlines()
    assert rows[0].startswith("| method | MAC ratio | class cosine | token cosine | agreement |")
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| dense", "| merge", "| route"]
    assert found.draw(pictures).width > 192
    again = compress(Dense("m", small_vit(), _VIEW), pictures, Wishes(0.7), _CPU)
    assert [each.fidelity for each in again.results] == [each.fidelity for each in found.results]


def test_routers_of_few_pictures_are_fitted_on_crops_too(pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, seen = dge_models.fit_routers, []

    def noted(model: nn.Module, loader: list[Tensor], ratio: float, **settings: Any) -> Any:
        found = fit(model, loader, ratio, **settings)
        seen.append((found.images, found.setting.images))
        return found

    monkeypatch.setattr(dge_models, "fit_routers", noted)
    compress(Dense("m", small_vit(), _VIEW), pictures, Wishes(0.7, method="route"), _CPU)
    assert seen == [(64, 16)]


def test_auto_leaves_out_what_does_not_fit_the_time(pictures: Pictures) -> None:
    with pytest.raises(UserError, match=r"merge: it may take \S+ minutes, and 0.0 are left; route: it may take"):
        compress(Dense("m", small_vit(), _VIEW), pictures, Wishes(0.7, minutes=1e-6), _CPU)
    with pytest.raises(UserError, match=r"distill: it may take \S+ minutes, and 0.0 are left"):
        compress(Dense("m", small_vit(), _VIEW), pictures, Wishes(0.7, method="distill", minutes=1e-6), _CPU)
    found = compress(Dense("m", small_vit(), _VIEW), pictures, Wishes(0.7, method="merge", minutes=1e-6), _CPU)
    assert found.choice.method == "merge"


def test_one_method_may_fail_where_another_does_not(pictures: Pictures) -> None:
    # Eva's rotary embeddings cannot merge.
    shape = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 0}
    torch.manual_seed(0)
    model = timm.create_model("eva02_tiny_patch14_224", **shape).eval()
    found = compress(Dense("m", model, _VIEW), pictures, Wishes(0.8), _CPU)
    assert found.choice.method == "route"
    assert "merge: no model: model: got Eva; expected timm's VisionTransformer" in found.table
    assert set(found.facts["without_model"]) == {"merge"}


def test_no_method_at_all(pictures: Pictures) -> None:
    for model, ratio, words in (
        (small_vit(), 0.05, r"model m cannot be made cheaper to a ratio of 0.05: merge: ratio: got 0.05; .*route: "),
        (timm.create_model("test_resnet", num_classes=3).eval(), 0.6, r"merge: model: got ResNet; .*route: model: got"),
    ):
        with pytest.raises(UserError, match=words):
            compress(Dense("m", model, _VIEW), pictures, Wishes(ratio), _CPU)
