"""What a task is: all that training, evaluation and the commands have to ask about what is learnt."""

from collections.abc import Callable
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from dge_recipes.classes import Classes
from dge_recipes.config import Config
from dge_recipes.data import HeldOutData, TrainingData
from dge_recipes.data.registry import DataConfig
from dge_recipes.engine.losses import TrainingLosses

__all__ = ["Task", "TaskEvaluation"]


class TaskEvaluation(Protocol):
    """What an evaluation found, in any task."""

    @property
    def images(self) -> int:
        """Images evaluated."""

    @property
    def unreadable(self) -> int:
        """Images of the set that could not be read, and are in none of the other numbers."""

    @property
    def macs(self) -> float:
        """Mean multiply-accumulates per image of the whole model."""

    @property
    def mac_ratio(self) -> float:
        """The same over those of the model with every query computed; 1 without routers."""

    @property
    def score(self) -> float:
        """How good the model is; the larger the better, never negative."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""


class Task(Protocol):
    """What is learnt: from which data, by which model and loss, and how well.

    Batches are the task's own: (images, targets), tensors or lists and dicts of them.

    Attributes:
        score_name: what ``as_dict()`` of an evaluation calls its score.
        score_label: what pictures call it, with its unit.
        curves: which of its numbers are drawn over the epochs when a run ends; empty for no picture.
        judges_start: whether what a run starts from is evaluated and saved too, as good enough to be the best.
    """

    score_name: str
    score_label: str
    curves: tuple[str, ...]
    judges_start: bool

    def build_data(self, config: Config, num_processes: int) -> tuple[TrainingData, HeldOutData]:
        """The training and the held-out set of a run, of the same classes.

        Raises:
            UserError: data that is missing or unusable, or classes that differ.
        """

    def build_held_out(self, config: Config, classes: Classes | None, known: str) -> HeldOutData:
        """The held-out set, for a model that knows certain classes.

        Args:
            config: whose ``data`` section it is of.
            classes: that the model knows; None: they follow from the data.
            known: subject and verb for an error, such as ``the weights x know``.

        Raises:
            UserError: data that is missing or unusable, or of other classes.
        """

    def build_model(
        self,
        config: Config,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        init: bool = True,
        classes: Classes | None = None,
    ) -> nn.Module:
        """The network, on the CPU.

        Args:
            config: the recipe.
            num_classes: that it tells apart.
            image_shape: (channels, height, width) of the images it will see.
            init: start from ``model.init_from``; False where other weights follow anyway.
            classes: what the outputs stand for.

        Raises:
            UserError: an unknown model or argument, or weights that do not fit.
        """

    def backbone(self, model: nn.Module) -> nn.Module:
        """The part of a network that is a model of timm or ours, which is compiled and may recompute activations."""

    def build_losses(self, config: Config, model: nn.Module) -> TrainingLosses:
        """The network with its training loss and budget."""

    def preparation(
        self, config: Config, model: nn.Module, held_out: HeldOutData, classes: Classes, accelerator: Accelerator
    ) -> Callable[[Any, Any], tuple[Any, Any, Any]]:
        """What turns a batch of the loader into what the loss module takes: images, targets, and a teacher's answers.

        Args:
            config: the recipe.
            model: that is trained; may be told that it has a teacher.
            held_out: shape and number of classes.
            classes: of the training images.
            accelerator: of the run.

        Raises:
            UserError: a teacher that cannot be used, or batches that cannot be mixed.
        """

    def evaluate(
        self,
        model: nn.Module,
        loader: Any,
        accelerator: Accelerator,
        held_out: HeldOutData,
        after_batch: Callable[[], None] = lambda: None,
    ) -> TaskEvaluation:
        """Evaluate a network, each process its share of the images; the same numbers in all of them.

        Args:
            model: without wrappers, on the accelerator's device; its mode is restored.
            loader: of the held-out set, as prepared.
            accelerator: of the run.
            held_out: the set.
            after_batch: called in every process; what it raises ends the evaluation.

        Raises:
            UserError: too few of the images can be read.
        """

    def figures(self, evaluation: Any) -> dict[str, str]:
        """What an evaluation says of how good a network is, by the names that tables have; the score comes first."""

    def table(self, model: str, evaluation: Any, speed: float | None, published: Any = None) -> str:
        """A row of results in Markdown, with its head.

        Args:
            model: its name.
            evaluation: of it.
            speed: images per second; None where it was not measured.
            published: the row to put below; None where there is none.
        """

    def first_images(self, data_set: Dataset[Any], count: int) -> Any:
        """The first images of a held-out set as one batch that the network takes; has a length."""

    def calibration_batches(self, config: Config, model: nn.Module) -> list[Tensor]:
        """Training images that are not augmented, as the routed part of the network sees them, to set its budget on.

        Returns:
            Batches float32 [B, C, H, W], on the CPU.

        Raises:
            UserError: the data are not there.
        """

    def stand_in(self, config: Config, num_images: int) -> tuple[DataConfig, str]:
        """Data made in memory for a dry run where the recipe's are absent, and what they are, in words."""
