"""Fidelity against a dense model, by definition."""

import copy

import pytest
import torch
from small_models import small_vit
from torch.nn import functional as F

from dge_recipes.compress.fidelity import answers_of, measure_fidelity, reads_class_token

_CPU = torch.device("cpu")


def _changed(model: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[1].mlp.fc2.weight.add_(torch.randn_like(other.blocks[1].mlp.fc2.weight), alpha=0.3)
    return other


@pytest.mark.parametrize(
    ("kwargs", "class_token"),
    [({}, True), ({"global_pool": "avg"}, False), ({"global_pool": "avg", "class_token": False}, False)],
)
@pytest.mark.parametrize("num_classes", [5, 0])
def test_means_over_pictures(kwargs: dict[str, object], class_token: bool, num_classes: int) -> None:
    dense = small_vit(num_classes, **kwargs)
    other = _changed(dense)
    batches = [torch.randn(3, 3, 64, 64), torch.randn(1, 3, 64, 64)]
    found = measure_fidelity(dense, {"dense": dense, "other": other}, batches, _CPU)
    same = found["dense"]
    assert (same.mac_ratio, same.class_cosine, same.token_cosine) == pytest.approx((1, 1, 1))
    images = torch.cat(batches)
    with torch.no_grad():
        one, two = dense.forward_features(images), other.forward_features(images)
        logits = dense(images), other(images)
    prefix = dense.num_prefix_tokens
    assert reads_class_token(dense) is class_token
    if class_token:
        vectors = one[:, 0], two[:, 0]
    else:
        norm = dense.fc_norm
        vectors = norm(one[:, prefix:].mean(1)), norm(two[:, prefix:].mean(1))
    assert found["other"].class_cosine == pytest.approx(F.cosine_similarity(*vectors).mean().item(), abs=1e-5)
    tokens = F.cosine_similarity(one[:, prefix:], two[:, prefix:], dim=-1).mean().item()
    assert found["other"].token_cosine == pytest.approx(tokens, abs=1e-5)
    assert tokens < 0.99
    if num_classes:
        agreement = (logits[0].argmax(1) == logits[1].argmax(1)).double().mean().item()
        assert found["other"].agreement == pytest.approx(agreement)
    else:
        assert found["other"].agreement is None


def test_answers_have_the_grid_alone_as_tokens() -> None:
    model = small_vit()
    with torch.no_grad():
        answers = answers_of(model, torch.zeros(2, 3, 64, 64))
    assert (answers.vector.shape, answers.tokens.shape) == ((2, 48), (2, 64, 48))
    assert answers.logits is not None
    assert answers.logits.shape == (2, 5)
