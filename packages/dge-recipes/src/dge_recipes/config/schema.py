"""The configuration tree: every key a recipe has, its type, its bounds and its meaning.

Unknown keys and wrong types are errors (:mod:`dge_recipes.config.loading` words them). Fields describe
themselves: ``dge-train --keys`` prints this file's descriptions.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from dge_recipes.config.head import HeadConfig
from dge_recipes.config.student import StudentConfig
from dge_recipes.data.registry import DataConfig
from dge_recipes.sections import Beta, Count, Fraction, NonNegative, NonNegativeInt, Positive, Section

__all__ = [
    "BudgetConfig",
    "CheckpointConfig",
    "Config",
    "ConvertConfig",
    "DistillationConfig",
    "EvalConfig",
    "HeadConfig",
    "MixingConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "ScheduleConfig",
    "StudentConfig",
    "TrainConfig",
]


class ConvertConfig(Section):
    """Give a plain vision transformer routed blocks (``dge_models.from_timm``)."""

    splits: tuple[Count, ...] = Field(
        default=(4, 2, 1), strict=False, description="queries per region side, finest first"
    )
    layers: tuple[int, ...] | None = Field(
        default=None, strict=False, description="blocks that route, negative ones from the end; null for all"
    )


class ModelConfig(Section):
    """Which network, and what it starts from."""

    name: str = Field(description="a model name known to timm, the DGE models included")
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments for timm.create_model, for example {img_size: 48}"
    )
    init_from: str | None = Field(
        default=None,
        description="a run folder, checkpoint folder or weights file that holds the named model's weights to "
        "start from; a head of another size is left out",
    )
    convert: ConvertConfig | None = Field(
        default=None, description="give the named model, once init_from is loaded, routed blocks"
    )
    training_mode: Literal["dense", "sparse"] = Field(
        default="dense",
        description="in training DGE blocks compute every split (dense) or the chosen one alone (sparse)",
    )


class MixingConfig(Section):
    """Mixup and CutMix, through timm. Both zero: no mixing."""

    mixup: NonNegative = Field(default=0.0, description="mixup's alpha, 0 for none")
    cutmix: NonNegative = Field(default=0.0, description="CutMix's alpha, 0 for none")
    prob: Fraction = Field(default=1.0, description="probability that a batch is mixed")
    switch_prob: Fraction = Field(default=0.5, description="probability of CutMix where both are on")


class OptimConfig(Section):
    """The optimiser; biases, norms, position embedding and prefix tokens get no weight decay."""

    name: str = Field(default="adamw", description="an optimiser name known to timm")
    lr: Positive = Field(description="peak learning rate")
    lr_batch: Count | None = Field(
        default=None,
        description="images per step that lr is meant for: scaled linearly to the real number; null: lr as it is",
    )
    weight_decay: NonNegative = Field(default=0.05, description="decoupled weight decay")
    betas: tuple[Beta, Beta] | None = Field(
        default=None, strict=False, description="the optimiser's betas, null for its own default"
    )
    eps: Positive | None = Field(default=None, description="the optimiser's epsilon, null for its own default")
    clip_grad: Positive | None = Field(default=None, description="largest gradient norm, null for no clipping")


class ScheduleConfig(Section):
    """Linear warm-up, then a falling rate, both per optimiser step."""

    kind: Literal["cosine", "step", "poly"] = Field(
        default="cosine",
        description="after the warm-up: one cosine to min_lr; step: times gamma at each of the milestones; poly: "
        "(1 - share of the run done) ^ power down to min_lr",
    )
    warmup_epochs: NonNegative = Field(default=0.0, description="epochs of linear warm-up")
    warmup_lr: NonNegative = Field(default=1e-6, description="learning rate at the first step of the warm-up")
    min_lr: NonNegative = Field(default=1e-5, description="learning rate that cosine and poly end at")
    milestones: tuple[Positive, ...] = Field(
        default=(), strict=False, description="step: epochs after which the rate falls, ascending"
    )
    gamma: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.1, description="step: factor at each milestone")
    power: Positive = Field(default=0.9, description="poly: exponent")


class BudgetConfig(Section):
    """What holds the whole model's MACs down; unused by models without routers."""

    kind: Literal["loss", "controller", "random", "set"] = Field(
        default="loss",
        description="loss: the paper's penalty weight * (ratio - target)^2; controller: a learned price that meets "
        "the target; random: a ratio from target to high drawn for each step, so that dge-eval --budget can choose; "
        "set (distillation): routers stay as they were fitted, and before every evaluation are shifted to the target",
    )
    target: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="aim for dynamic / dense MACs; the smallest of them where kind is random"
    )
    high: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="largest ratio where kind is random")
    weight: NonNegative | None = Field(
        default=None, description="of the penalty's square; null: the kind's own (loss 1, controller 8, random 0)"
    )
    rate: NonNegative | None = Field(
        default=None, description="how fast controller and random learn, per step; null: the kind's own"
    )
    noiseless_epochs: NonNegativeInt = Field(
        default=0,
        description="last epochs that route as evaluation does, without Gumbel noise, so that the ratio trained is "
        "the ratio evaluated; the controller looks at that one anyway",
    )


class DistillationConfig(Section):
    """Learning from a trained teacher beside the labels: (1 - alpha) * task + alpha * distillation."""

    kind: Literal["none", "soft", "hard"] = Field(
        default="none", description="soft: the teacher's probabilities; hard: its likeliest class; none: no teacher"
    )
    teacher: str | None = Field(default=None, description="the teacher's model name, known to timm")
    weights: str | None = Field(default=None, description="the file that holds the teacher's weights")
    alpha: Fraction = Field(default=0.5, description="share of the distillation loss in the task's")
    temperature: Positive = Field(default=1.0, description="divides both logits in soft distillation")


class TrainConfig(Section):
    """The training loop."""

    epochs: Count = Field(description="passes over the training images")
    batch_size: Count = Field(description="images per process in one forward")
    accumulation_steps: Count = Field(default=1, description="forwards per optimiser step")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.1, description="label smoothing")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="decay of the weights' moving average, null for none"
    )
    seed: NonNegativeInt = Field(default=0, description="the run's only source of randomness")
    device: Literal["auto", "cpu"] = Field(default="auto", description="cpu: leave accelerators alone")
    compile: str | None = Field(
        default=None, description="torch.compile backend for the network, for example inductor; null: eager"
    )
    checkpoint_activations: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, more time"
    )
    shard: bool = Field(
        default=False,
        description="divide parameters, gradients and optimiser state among the processes (FSDP2) instead of copying "
        "them to each (DDP): less memory, more communication",
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="a loss that is not finite: stop and save the batch, or skip the step (waits for the device at "
        "every step) and go on",
    )
    skip_limit: Count = Field(default=10, description="skipped steps after which non_finite=skip stops too")
    log_every: Count = Field(default=10, description="optimiser steps between two log lines")
    eval_every: Count = Field(default=1, description="epochs between two evaluations; the last is always evaluated")


class EvalConfig(Section):
    """Evaluation on the held-out images."""

    batch_size: Count = Field(default=64, description="images per process in one forward")
    timing_rounds: NonNegativeInt = Field(
        default=10, description="forwards timed for images/s at the end, 0 for no timing"
    )


class CheckpointConfig(Section):
    """What is kept in the run's checkpoints folder."""

    every_epochs: Count = Field(default=1, description="epochs between two checkpoints; the last is always kept")
    every_steps: Count | None = Field(default=None, description="also every so many optimiser steps, null for none")
    keep_last: Count = Field(default=2, description="newest checkpoints to keep; the best is kept beside them")


class OutputConfig(Section):
    """Where the run writes."""

    dir: str = Field(description="the run's folder")
    trackers: tuple[str, ...] = Field(
        default=("tensorboard",), strict=False, description="experiment trackers, by Accelerate's names"
    )


class Config(Section):
    """One run: ``dge-train --config`` reads it, ``config.yaml`` in the run's folder records it."""

    task: Literal["classification", "detection", "segmentation", "distillation"] = Field(
        default="classification", description="what the model learns"
    )
    model: ModelConfig
    head: HeadConfig = HeadConfig()
    data: DataConfig
    mixing: MixingConfig = MixingConfig()
    optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    budget: BudgetConfig = BudgetConfig()
    distillation: DistillationConfig = DistillationConfig()
    student: StudentConfig = StudentConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: OutputConfig
