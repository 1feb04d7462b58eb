"""Distillation: closer to the dense model at the same cost, or nothing changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import draw_pictures, small_vit
from torch import nn

import dge_models
from dge_recipes.compress.crops import read_crops
from dge_recipes.compress.distill import Lesson, _multiplies_bfloat16, _spread, distill
from dge_recipes.compress.fidelity import measure_fidelity
from dge_recipes.compress.pictures import Pictures, pictures_section, read_pictures
from dge_recipes.compress.teaching import Manner

_CPU = torch.device("cpu")
_VIEW = {"image_size": 64, "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
_RATIO = 0.6

MakeLesson = Callable[..., Lesson]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    folder = draw_pictures(tmp_path_factory.mktemp("photos"), 24)
    return read_pictures(pictures_section(folder, _VIEW, ("data.held_out=0.3",)), batch_size=8, limit=50)


@pytest.fixture
def lesson(pictures: Pictures) -> MakeLesson:
    def make(**settings: Any) -> Lesson:
        crops = read_crops(pictures.train, pictures.section, seed=0)
        return Lesson(crops, pictures.calibration, pictures.held_out, batch_size=8, **settings)

    return make


def _routed(dense: nn.Module, pictures: Pictures) -> nn.Module:
    model = dge_models.from_timm(dense, (2, 1))
    dge_models.fit_routers(model, pictures.calibration, _RATIO)
    return model.eval()


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("num_classes", [5, 0])
def test_it_comes_closer_and_keeps_the_ratio(num_classes: int, pictures: Pictures, lesson: MakeLesson) -> None:
    dense = small_vit(num_classes)
    start = _routed(dense, pictures)
    with torch.no_grad():  # what biases can mend, so that there is something to learn in seconds
        for block in start.blocks:  # type: ignore[union-attr]
            block.mlp.fc2.bias.add_(torch.randn(48), alpha=0.1)  # type: ignore[operator, union-attr]
    before, teacher = _weights(start), _weights(dense)
    found = distill(dense, start, _RATIO, lesson(seconds=300.0, steps=80, lr=3e-3))
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert all(torch.equal(value, teacher[name]) for name, value in dense.state_dict().items())
    assert found.best > 0
    models = {"start": start, "found": found.model}
    measured = measure_fidelity(dense, models, pictures.held_out, _CPU)
    assert 1 - measured["found"].score < 0.7 * (1 - measured["start"].score)
    ratio = measure_fidelity(dense, {"": found.model}, pictures.calibration, _CPU)[""].mac_ratio
    assert ratio == pytest.approx(_RATIO, abs=0.02)
    changed = {name for name, value in found.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(before[name].ndim == 1 for name in changed)
    assert not any(name.endswith("router.gate.weight") for name in changed)
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    facts = found.facts()
    assert facts["curve"][0]["step"] == 0
    assert facts["steps"] >= facts["best_step"] > 0
    assert facts["steps"] <= 80


def test_all_weights(pictures: Pictures, lesson: MakeLesson) -> None:
    dense = small_vit(0)
    start = _routed(dense, pictures)
    found = distill(dense, start, _RATIO, lesson(seconds=2.0, all_weights=True))
    light = distill(dense, start, _RATIO, lesson(seconds=0.0))
    routers = sum(value.numel() for name, value in start.named_parameters() if ".router." in name)
    assert found.parameters == sum(value.numel() for value in start.parameters()) - routers
    assert light.parameters < found.parameters / 10


def test_matrices_learn_where_there_are_many_pictures(
    pictures: Pictures, lesson: MakeLesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = _routed(small_vit(0), pictures)
    few = distill(small_vit(0), start, _RATIO, lesson(seconds=0.0))
    monkeypatch.setattr("dge_recipes.compress.distill._BREADTH", few.pictures)
    many = distill(small_vit(0), start, _RATIO, lesson(seconds=0.0))
    told = distill(small_vit(0), start, _RATIO, lesson(seconds=0.0, all_weights=False))
    never = distill(small_vit(0), start, _RATIO, lesson(seconds=0.0, manner=Manner(matrices=0.0)))
    assert few.parameters == told.parameters == never.parameters < many.parameters / 10


def test_matrices_learn_at_a_share_of_the_rate(pictures: Pictures, lesson: MakeLesson) -> None:
    dense = small_vit(0)
    start = _routed(dense, pictures)
    seen: list[dict[str, torch.Tensor]] = []
    settings = {"all_weights": True, "lr": 1e-2, "manner": Manner(matrices=0.1, average=0.0)}
    distill(
        dense,
        start,
        _RATIO,
        lesson(seconds=300.0, steps=1, look=lambda step, model: seen.append(_weights(model)), **settings),
    )
    moved = {name: (seen[1][name] - value).abs().max().item() for name, value in seen[0].items()}
    assert moved["blocks.0.norm1.bias"] == pytest.approx(1e-3, rel=0.02)  # a tenth of the peak, in Adam's first step
    assert moved["blocks.0.attn.proj.weight"] == pytest.approx(1e-4, rel=0.02)


def test_what_is_handed_out_is_never_worse(pictures: Pictures, lesson: MakeLesson) -> None:
    dense = small_vit(0)
    start = _routed(dense, pictures)
    lines: list[str] = []
    steps: list[int] = []

    def look(step: int, model: nn.Module) -> None:
        assert not model.training
        steps.append(step)

    found = distill(dense, start, _RATIO, lesson(seconds=4.0, lr=10.0, tell=lines.append, look=look))
    assert found.best == 0
    assert len(found.curve) == len(lines) > 1
    assert steps == [point.step for point in found.curve]
    assert found.curve[-1].fidelity.score < found.curve[0].fidelity.score
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in found.model.state_dict().items())


def test_the_average_is_what_is_measured(pictures: Pictures, lesson: MakeLesson) -> None:
    dense = small_vit(0)
    start = _routed(dense, pictures)
    seen: list[dict[str, torch.Tensor]] = []

    def look(step: int, model: nn.Module) -> None:
        seen.append(_weights(model))

    def last(average: float) -> torch.Tensor:
        distill(dense, start, _RATIO, lesson(seconds=300.0, steps=8, manner=Manner(average=average), look=look))
        return seen[-1]["norm.bias"] - start.state_dict()["norm.bias"]

    learned, averaged = last(0.0), last(0.97)
    assert learned.norm() > averaged.norm() > 0.1 * learned.norm()


def test_without_time_it_is_the_start(pictures: Pictures, lesson: MakeLesson, tmp_path: Path) -> None:
    dense = small_vit(0)
    start = _routed(dense, pictures)
    found = distill(dense, start, _RATIO, lesson(seconds=0.0))
    assert (found.best, [point.step for point in found.curve]) == (0, [0])
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in found.model.state_dict().items())


def test_pictures_that_the_budget_is_set_on_are_spread_over_all() -> None:
    batches = list(torch.arange(10.0).view(10, 1, 1, 1).split(4))
    assert torch.equal(torch.cat(_spread(batches, 5)).flatten(), torch.tensor([0.0, 2, 4, 6, 8]))
    assert [len(batch) for batch in _spread(batches, 5)] == [4, 1]
    assert _spread(batches, 10) == batches


@pytest.mark.parametrize(
    ("can", "halved"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False), (None, False)],
)
def test_matrices_are_halved_where_the_processor_says_that_it_can(
    monkeypatch: pytest.MonkeyPatch, can: dict[str, bool] | None, halved: bool
) -> None:
    if can is None:  # PyTorch 2.10
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    assert _multiplies_bfloat16(torch.device("cpu")) is halved
