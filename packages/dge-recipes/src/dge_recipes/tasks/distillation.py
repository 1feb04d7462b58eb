"""Distillation: a routed copy of a pretrained model learns to answer as the model itself does, without labels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import dge_models
from dge_recipes.classes import Classes
from dge_recipes.compress.distill import choose_parameters
from dge_recipes.compress.fidelity import Answers, answers_of
from dge_recipes.compress.teaching import answer_loss
from dge_recipes.config import Config, ImageData, ModelConfig, RandomData
from dge_recipes.config.task_keys import check_distillation
from dge_recipes.data import HeldOutData, TrainingData
from dge_recipes.data.picture_loaders import build_picture_held_out, build_picture_training
from dge_recipes.data.registry import DataConfig
from dge_recipes.engine.budgets import build_budget, check_budget
from dge_recipes.engine.fitted_routers import FittedRouters, KeptRouters
from dge_recipes.engine.losses import MEASURED, SHARES, TrainingLosses, split_shares
from dge_recipes.errors import UserError
from dge_recipes.evaluation.fidelity import FidelityEvaluation, evaluate_fidelity
from dge_recipes.evaluation.speed import first_images
from dge_recipes.evaluation.table import results_table
from dge_recipes.evaluation.tradeoff import calibration_batches
from dge_recipes.models import create_model, own_classes, try_images

__all__ = ["Distillation", "DistillationLosses"]


class Distillation:
    """See :class:`dge_recipes.tasks.Task`. Batches are images float32 [B, 3, size, size] and labels that say nothing.

    The teacher is the dense model with the weights that the recipe names, and stays as it is. The student is a copy of
    it with ``model.convert``'s routed blocks, whose routers are fitted in closed form when a run begins
    (:func:`dge_models.fit_routers`, by the main process for all).

    With ``budget.kind=set`` routers stay as they were fitted, and pictures are routed in training as in evaluation: a
    step costs what the student costs. Changed tokens are routed otherwise, so before every evaluation one shift of all
    logits brings the student back to ``budget.target``. With ``loss``, ``controller`` and ``random`` the routers start
    as fitted and learn as in the other tasks; nothing is shifted.

    What a run starts from is evaluated and saved before the first step: the best checkpoint is never worse on the
    held-out pictures than routers alone.

    Args:
        config: the recipe.
    """

    score_name, score_label = "fidelity", "fidelity"
    curves: tuple[str, ...] = ("class_cosine", "token_cosine", "agreement", "mac_ratio")
    judges_start = True

    def __init__(self, config: Config) -> None:
        self._config = config
        self._teacher: nn.Module | None = None
        self._starts = False
        # In a run whose routers are kept: what shifts them, and from where.
        self._routers: FittedRouters | None = None
        self._kept: KeptRouters | None = None

    def build_data(self, config: Config, num_processes: int) -> tuple[TrainingData, HeldOutData]:
        """Pictures to take crops of, and whole ones of the held-out tenth; their classes are the model's outputs."""
        outputs = own_classes(config.model)
        return build_picture_training(config, num_processes, outputs), build_picture_held_out(config, outputs)

    def build_held_out(self, config: Config, classes: Classes | None, known: str) -> HeldOutData:
        """Whole pictures of the held-out tenth; weights without classes have no head."""
        return build_picture_held_out(config, classes or Classes(0))

    def build_model(
        self,
        config: Config,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        init: bool = True,
        classes: Classes | None = None,
    ) -> nn.Module:
        """The student; with `init` it has the teacher's weights, and its routers wait to be fitted."""
        check_distillation(config)
        self._starts = init
        student = create_model(config.model, num_classes, init=False)
        if init:
            student.load_state_dict({**student.state_dict(), **self._dense().state_dict()})
        try_images(student, config.model, image_shape)
        return student.train()

    def backbone(self, model: nn.Module) -> nn.Module:
        """All of it."""
        return model

    def build_losses(self, config: Config, model: nn.Module) -> "DistillationLosses":
        """Distance to the teacher's answers, and budget."""
        losses = DistillationLosses(model, config)
        if isinstance(losses.budget, KeptRouters):
            losses.budget.remember(model)
            self._kept = losses.budget
        return losses

    def preparation(
        self, config: Config, model: nn.Module, held_out: HeldOutData, classes: Classes, accelerator: Accelerator
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Answers]]:
        """Fits the routers where a run begins, says which weights learn, and has the teacher answer every batch."""
        teacher = self._dense().to(accelerator.device)
        _check_normalisation(config, teacher)
        self._routers = FittedRouters(config, accelerator)
        if self._starts:
            check_budget(config.budget, model, held_out.image_shape)
            self._routers.fit(model.to(accelerator.device))
        choose_parameters(model, all_weights=config.student.train == "all", routers_too=config.budget.kind != "set")

        def ask(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Answers]:
            with torch.no_grad(), accelerator.autocast():
                return images, labels, answers_of(teacher, images)

        return ask

    def evaluate(
        self,
        model: nn.Module,
        loader: Any,
        accelerator: Accelerator,
        held_out: HeldOutData,
        after_batch: Callable[[], None] = lambda: None,
    ) -> FidelityEvaluation:
        """See :func:`dge_recipes.evaluation.fidelity.evaluate_fidelity`; in a run kept routers are shifted before."""
        if self._kept is not None and self._routers is not None:
            self._routers.settle(model, self._kept)
        teacher = self._dense().to(accelerator.device)
        return evaluate_fidelity(teacher, model, loader, accelerator, held_out, after_batch)

    def figures(self, evaluation: FidelityEvaluation) -> dict[str, str]:
        """Cosines, and where there are classes how often the likeliest is the dense model's."""
        kept = evaluation.kept
        found = {
            "fidelity": f"{evaluation.score:.4f}",
            "class cosine": f"{kept.class_cosine:.4f}",
            "token cosine": f"{kept.token_cosine:.4f}",
        }
        return found if kept.agreement is None else {**found, "agreement": f"{kept.agreement:.1%}"}

    def table(self, model: str, evaluation: FidelityEvaluation, speed: float | None, published: Any = None) -> str:
        """A row with the MAC ratio and what is kept of the dense model's answers."""
        figures = {"MAC ratio": f"{evaluation.mac_ratio:.3f}", **self.figures(evaluation)}
        return results_table(model, figures, evaluation.macs, speed)

    def first_images(self, data_set: Dataset[Any], count: int) -> Tensor:
        """Float32 [<= count, 3, size, size]."""
        return first_images(data_set, count)

    def calibration_batches(self, config: Config, model: nn.Module) -> list[Tensor]:
        """See :func:`dge_recipes.evaluation.tradeoff.calibration_batches`."""
        return calibration_batches(config)

    def stand_in(self, config: Config, num_images: int) -> tuple[DataConfig, str]:
        """Noise of the recipe's size."""
        size = config.data.image_size
        data = RandomData(name="random", image_size=size, num_classes=1, num_images=num_images)
        return data, f"random images of {size} x {size}"

    def _dense(self) -> nn.Module:
        """The teacher, loaded once; a run that is resumed or evaluated finds it where it was."""
        if self._teacher is None:
            self._teacher = _load_dense(self._config.model)
        return self._teacher


class DistillationLosses(TrainingLosses):
    """A student with its distance to the teacher's answers.

    Args:
        model: the student, with routed blocks.
        config: the budget. With ``budget.kind=set`` the student stays in evaluation mode.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.model = model
        self.names = ("loss", "task", "distillation", "budget", "mac_ratio", "class_cosine", "token_cosine")
        self.budget = build_budget(config.budget, config.train.seed)

    def train(self, mode: bool = True) -> "DistillationLosses":
        """Kept routers route as in evaluation."""
        super().train(mode)
        if isinstance(self.budget, KeptRouters):
            self.model.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor, teacher: Answers) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            images: [B, 3, size, size].
            targets: say nothing.
            teacher: what the dense model answers for these images.

        Returns:
            Scalars: ``loss`` to differentiate; and, detached, ``task``, the distance to the teacher's answers
            (:func:`~dge_recipes.compress.teaching.answer_loss`), ``distillation`` (the same: there is no other task),
            ``budget`` (penalty), ``mac_ratio``, ``class_cosine`` and ``token_cosine``, means over the batch, and
            ``measured_ratio``, what the budget learns from. ``split_shares`` [L, n]: each routed layer's regions per
            split, as fractions.
        """
        with dge_models.collect_routings(self.model) as collected:
            answers = answers_of(self.model, images)
        routed, routings = collected.model, collected.routings
        distance, penalty = answer_loss(answers, teacher), self.budget(routed, routings)
        values = {
            "task": distance,
            "distillation": distance,
            "budget": penalty,
            "mac_ratio": dge_models.mac_ratio(routed, routings),
            "class_cosine": _cosine(answers.vector, teacher.vector),
            "token_cosine": _cosine(answers.tokens, teacher.tokens),
            MEASURED: self.budget.measure(routed, routings),
        }
        report = {name: value.detach() for name, value in values.items()}
        return {"loss": distance + penalty, **report, SHARES: split_shares(routings, images)}


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return F.cosine_similarity(one.detach().float(), other.float(), dim=-1).mean()


def _load_dense(settings: ModelConfig) -> nn.Module:
    """A recipe's model before conversion, with the weights of ``init_from`` or those that timm has for the name.

    Raises:
        UserError: they are not to be had.
    """
    outputs, of_timm = own_classes(settings).count, settings.init_from is None
    kwargs = {"pretrained": True, **settings.kwargs} if of_timm else settings.kwargs
    try:
        model = create_model(settings.model_copy(update={"convert": None, "kwargs": kwargs}), outputs)
    except Exception as error:  # what hubs raise has no class in common
        if isinstance(error, UserError) and not of_timm:
            raise
        raise UserError(
            f"the weights of model {settings.name} are not to be had: {' '.join(str(error).split())}; without a "
            "network, model.name=local-dir:FOLDER reads a saved model, and model.init_from a file"
        ) from error
    return model.eval().requires_grad_(False)


def _check_normalisation(config: Config, teacher: nn.Module) -> None:
    """Pictures must look as those did that the teacher was trained on; of other weights than timm's nobody knows."""
    facts: Any = getattr(teacher, "pretrained_cfg", None) or {}
    if config.model.init_from is not None or not isinstance(config.data, ImageData):
        return
    for key in ("mean", "std"):
        got, expected = getattr(config.data, key), tuple(facts.get(key) or ())
        if expected and not _close(got, expected):
            name = config.model.name
            raise UserError(f"data.{key}: got {list(got)}, expected {list(expected)}, which {name} was trained with")


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 1e-4 for a, b in zip(one, other, strict=True))
