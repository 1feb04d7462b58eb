"""How much of the dense model's answers a cheaper copy keeps, on pictures that neither was calibrated on."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dge_models

__all__ = ["Answers", "Fidelity", "answers_of", "compare", "measure_fidelity", "reads_class_token"]


@dataclass(frozen=True)
class Fidelity:
    """Means over pictures; 1 is the dense model's own.

    Attributes:
        mac_ratio: MACs over the dense model's.
        class_cosine: cosine of the class token, or of the pooled features where the model pools, to the dense one's.
        token_cosine: of the tokens of the grid, each to the dense model's at the same place.
        agreement: share of pictures whose likeliest class is the same; None for models without a classifier.
    """

    mac_ratio: float
    class_cosine: float
    token_cosine: float
    agreement: float | None

    @property
    def score(self) -> float:
        """What methods are compared by: the class cosine of a classifier; else the mean of both cosines."""
        return self.class_cosine if self.agreement is not None else (self.class_cosine + self.token_cosine) / 2

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Answers:
    """What a model says of B pictures.

    Attributes:
        vector: [B, C], the class token after the last norm, or the pooled features.
        tokens: [B, N, C], the tokens of the grid after the last norm.
        logits: [B, classes]; None without a classifier.
    """

    vector: Tensor
    tokens: Tensor
    logits: Tensor | None


def reads_class_token(model: Any) -> bool:
    """Whether a model's answer is its class token, not a mean or another pooling of its tokens."""
    return model.global_pool in ("token", "cls") and model.num_prefix_tokens > 0


def answers_of(model: Any, images: Tensor) -> Answers:
    """Run a vision transformer of timm's, dense or a cheaper copy; gradients and modes are the caller's.

    Args:
        model: with timm's names of its parts.
        images: [B, 3, H, W], on its device.
    """
    features = model.forward_features(images)
    vector = features[:, 0] if reads_class_token(model) else model.forward_head(features, pre_logits=True)
    logits = model.forward_head(features) if model.num_classes else None
    return Answers(vector, features[:, model.num_prefix_tokens :], logits)


def measure_fidelity(
    dense: nn.Module, models: Mapping[str, nn.Module], batches: Iterable[Tensor], device: torch.device
) -> dict[str, Fidelity]:
    """Compare models with the dense one.

    Args:
        dense: in evaluation mode, on the device.
        models: by name, likewise.
        batches: pictures [B, 3, H, W]; at least one.
        device: of all models.
    """
    sums = {name: torch.zeros(5, dtype=torch.float64) for name in models}
    images = 0
    with torch.no_grad():
        for batch in batches:
            pixels = batch.to(device)
            expected = answers_of(dense, pixels)
            images += len(pixels)
            for name, model in models.items():
                sums[name] += compare(model, pixels, expected).sum(0)
    classifies = bool(getattr(dense, "num_classes", 0))
    found = {}
    for name, total in sums.items():
        _, ratio, class_cosine, token_cosine, agreement = (total / images).tolist()
        found[name] = Fidelity(ratio, class_cosine, token_cosine, agreement if classifies else None)
    return found


def compare(model: nn.Module, pixels: Tensor, expected: Answers) -> Tensor:
    """Compare a model with the dense one.

    Args:
        model: in evaluation mode, on the pictures' device.
        pixels: [B, 3, H, W].
        expected: what the dense model says of them.

    Returns:
        float64 [B, 5] on the CPU, of each picture: MACs, these over the dense model's, the cosines of the class token
        (or pooled features) and, on average, of the tokens, and 1 where the likeliest class is the same, else 0.
    """
    answers = answers_of(model, pixels)
    macs = dge_models.count_macs(model, pixels)
    same = torch.zeros(len(pixels))
    if answers.logits is not None and expected.logits is not None:
        same = answers.logits.argmax(-1) == expected.logits.argmax(-1)
    numbers = (
        macs.total,
        macs.total / macs.static_total,
        F.cosine_similarity(answers.vector.double(), expected.vector.double(), dim=-1),
        F.cosine_similarity(answers.tokens.double(), expected.tokens.double(), dim=-1).mean(1),
        same,
    )
    return torch.stack([each.double().cpu() for each in numbers], dim=1)
