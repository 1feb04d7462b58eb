"""Learning from a teacher: the trained network, and the loss against its answers.

Source: Touvron et al., "Training data-efficient image transformers & distillation through attention" (2021).
"""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

import dge_models
from dge_recipes.checkpoints.stored_classes import stored_classes
from dge_recipes.classes import Classes, match_classes
from dge_recipes.config import Config, ImageData
from dge_recipes.data.registry import DataConfig
from dge_recipes.errors import UserError

__all__ = ["Teacher", "build_teacher", "distillation_loss", "use_both_heads"]


class Teacher(nn.Module):
    """A frozen network that answers for normalised images.

    Args:
        network: a timm model.
        data: of the images that it will be given; where they are photographs they are normalised anew if the
            network was trained on another normalisation.
        outputs: of the network, one for each class of the data; None: all, in the data's order.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, data: DataConfig, outputs: Sequence[int] | None = None) -> None:
        super().__init__()
        self._outputs = None if outputs is None else list(outputs)
        self.network = network.eval().requires_grad_(False)
        scale, shift = torch.ones(1), torch.zeros(1)
        facts = getattr(network, "pretrained_cfg", None) or {}
        if isinstance(data, ImageData) and facts.get("mean") and facts.get("std"):
            mean, std, own_mean, own_std = (
                torch.tensor(each).view(-1, 1, 1) for each in (data.mean, data.std, facts["mean"], facts["std"])
            )
            scale, shift = std / own_std, (mean - own_mean) / own_std
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [B, classes] for images [B, C, H, W]."""
        logits: Tensor = self.network(images * self.scale + self.shift)
        return (logits if self._outputs is None else logits[:, self._outputs]).float()


def build_teacher(
    config: Config, num_classes: int, input_shape: tuple[int, int, int], classes: Classes | None = None
) -> Teacher | None:
    """The recipe's teacher, or None where it has none.

    Args:
        config: the run's configuration.
        num_classes: outputs that the teacher must have.
        input_shape: (channels, height, width) of the images.
        classes: what the labels stand for; those that the teacher's weights know must be the same.

    Raises:
        UserError: no such model, no such file, or weights that do not fit or know other classes.
    """
    settings = config.distillation
    if settings.kind == "none":
        return None
    if settings.teacher is None or settings.weights is None:
        raise UserError("distillation needs distillation.teacher, a model's name, and distillation.weights, a file")
    if settings.teacher not in timm.list_models():
        raise UserError(f"distillation.teacher: no model is called {settings.teacher!r}; see timm.list_models()")
    stored, outputs = stored_classes(Path(settings.weights)), None
    if stored is not None and classes is not None:
        known = f"distillation.weights: the teacher's {settings.weights} know"
        outputs = match_classes(stored, classes, range(classes.count), known=known, ways_out=False).outputs
    try:
        network = timm.create_model(settings.teacher, num_classes=num_classes, in_chans=input_shape[0])
        dge_models.load_checkpoint(network, settings.weights)
        with torch.no_grad():
            network.eval()(torch.zeros(1, *input_shape))
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"the teacher {settings.teacher} from {settings.weights} cannot be used: {message}") from error
    return Teacher(network, config.data, outputs)


def use_both_heads(model: nn.Module, distilled: bool) -> None:
    """Have a model with a distillation token answer with both of its heads in training."""
    if isinstance(model, VisionTransformerDistilled):
        model.set_distilled_training(distilled)


def distillation_loss(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """How far the student's answers are from the teacher's.

    Args:
        student: logits float [B, classes].
        teacher: logits float [B, classes].
        kind: ``hard``, cross-entropy with the teacher's likeliest class; ``soft``, Kullback-Leibler divergence of
            the probabilities at `temperature`, times its square, over B * classes as the authors' code takes it.
        temperature: divides both logits; unused where `kind` is ``hard``.

    Returns:
        float32 [].
    """
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(1))
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="sum",
        log_target=True,
    )
    return divergence * (temperature**2 / student.numel())
