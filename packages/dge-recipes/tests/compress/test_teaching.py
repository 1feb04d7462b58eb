"""What the dense model is asked, how often it is learned from, and what is told from it."""

from typing import Any

import pytest
import torch
from PIL import Image
from small_models import small_vit
from torch import Tensor, nn

import dge_models
from dge_recipes.compress.crops import Crops
from dge_recipes.compress.fidelity import answers_of
from dge_recipes.compress.pictures import pictures_section
from dge_recipes.compress.teaching import Manner, Teacher, answer_loss, kept_routing, outputs_of_blocks

_VIEW = {"image_size": 64, "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def crops(tmp_path: Any) -> Crops:
    generator = torch.Generator().manual_seed(0)
    small = [torch.randint(0, 255, (5, 7, 3), dtype=torch.uint8, generator=generator) for _ in range(9)]
    pictures = [Image.fromarray(each.numpy()).resize((140, 100), Image.Resampling.BICUBIC) for each in small]
    return Crops(pictures, pictures_section(tmp_path, _VIEW, ()), seed=0)


def _counted(dense: nn.Module) -> list[int]:
    asked: list[int] = []
    dense.register_forward_hook(lambda *_: asked.append(1))
    dense.norm.register_forward_hook(lambda *_: asked.append(1))  # type: ignore[operator, union-attr]
    return asked


def test_a_batch_is_asked_once_and_learned_from_several_times(crops: Crops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dge_recipes.compress.teaching._AT_FIRST", 1)
    dense = small_vit(0)
    asked = _counted(dense)
    teacher = Teacher(dense, crops, 2, Manner(times=3))
    batches = [teacher.batch(step) for step in range(12)]
    assert len(asked) == 4
    assert len({id(each) for each in batches}) == 4
    assert [batches[step] is batches[0] for step in (1, 2)] == [True, True]
    again = Teacher(dense, crops, 2, Manner(times=3))
    for step, batch in enumerate(batches):
        assert torch.equal(again.batch(step).images, batch.images)


def test_all_batches_are_learned_from_as_often(crops: Crops) -> None:
    teacher = Teacher(small_vit(0), crops, 2, Manner(times=3))
    batches = [id(teacher.batch(step)) for step in range(60)]
    assert len(set(batches[:8])) == 8
    assert max(batches.count(each) for each in set(batches)) <= 4
    assert any(one != other for one, other in zip(batches[9:11], batches[8:10], strict=True))


def test_the_oldest_batch_is_forgotten(crops: Crops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dge_recipes.compress.teaching._MOST", 2)
    teacher = Teacher(small_vit(0), crops, 2, Manner(times=1))
    batches = [teacher.batch(step) for step in range(3)]
    assert [any(each is known for known in teacher._known) for each in batches] == [False, True, True]


@pytest.mark.parametrize("num_classes", [5, 0])
def test_the_dense_model_itself_has_nothing_to_learn(num_classes: int, crops: Crops) -> None:
    dense = small_vit(num_classes)
    teacher = Teacher(dense, crops, 4, Manner(half=False))
    taught = teacher.batch(0)
    assert teacher.loss(dense, taught).item() == pytest.approx(0.0, abs=1e-5)
    copy = dge_models.from_timm(dense, (2, 1)).eval()
    with torch.no_grad():
        copy.blocks[0].mlp.fc2.bias.add_(0.5)  # type: ignore[operator, union-attr]
    assert teacher.loss(copy, taught).item() > 0.01


def test_blocks_are_told_beside_the_answers(crops: Crops) -> None:
    dense = small_vit(0)
    copy = dge_models.from_timm(dense, (2, 1)).eval()
    with torch.no_grad():
        copy.blocks[0].mlp.fc2.bias.add_(0.5)  # type: ignore[operator, union-attr]
    losses = {}
    for weight in (0.0, 1.0, 2.0):
        teacher = Teacher(dense, crops, 4, Manner(blocks=weight))
        taught = teacher.batch(0)
        losses[weight] = teacher.loss(copy, taught).item()
    assert losses[0.0] == pytest.approx(answer_loss(answers_of(copy, taught.images), taught.answers).item())
    assert losses[2.0] - losses[0.0] == pytest.approx(2 * (losses[1.0] - losses[0.0]), rel=1e-3)
    assert losses[1.0] > losses[0.0] + 0.01


def test_outputs_of_blocks_are_theirs() -> None:
    dense = small_vit(0)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), outputs_of_blocks(dense, [0, len(dense.blocks) - 1]) as found:  # type: ignore[arg-type]
        features = dense.forward_features(images)  # type: ignore[operator]
    assert torch.equal(dense.norm(found[1]), features)  # type: ignore[operator]
    with torch.no_grad():
        dense(images)
    assert len(found) == 2


def test_no_gradient_flows_through_a_choice() -> None:
    block = dge_models.DGEBlock(16, 2, splits=(2, 1)).eval()
    with torch.no_grad():
        block.router.gate.bias.zero_()

    def gradient(*, kept: bool) -> tuple[Tensor, Tensor]:
        block.zero_grad()
        tokens = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        if kept:
            with kept_routing(block):
                out = block(tokens, (4, 4))
        else:
            out = block(tokens, (4, 4))
        out.square().sum().backward()
        return out.detach(), block.router.gate.weight.grad

    plain, through = gradient(kept=False)
    same, nothing = gradient(kept=True)
    assert torch.equal(plain, same)
    assert through.abs().max() > 0
    assert nothing is None
    assert not block.router._forward_hooks
