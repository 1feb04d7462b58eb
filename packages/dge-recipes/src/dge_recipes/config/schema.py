"""The configuration tree: every key a recipe has, its type, its bounds and its meaning.

Unknown keys and wrong types are errors (:mod:`dge_recipes.config.loading` words them). Fields describe
themselves: ``dge-train --keys`` prints this file's descriptions.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "BudgetConfig",
    "CheckpointConfig",
    "Config",
    "ConvertConfig",
    "DigitsData",
    "EvalConfig",
    "ImageFolderData",
    "MixingConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "ScheduleConfig",
    "TrainConfig",
]

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ConvertConfig(_Section):
    """Give a plain vision transformer routed blocks (``dge_models.from_timm``)."""

    splits: tuple[Count, ...] = Field(
        default=(4, 2, 1), strict=False, description="queries per region side, finest first"
    )
    layers: tuple[int, ...] | None = Field(
        default=None, strict=False, description="blocks that route, negative ones from the end; null for all"
    )


class ModelConfig(_Section):
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


class DigitsData(_Section):
    """scikit-learn's handwritten digits, drawn on flat ground: 1437 training and 360 held-out images."""

    name: Literal["digits"]
    image_size: Count = Field(default=48, description="side of the square image, in pixels")
    digit_size: Positive = Field(default=24.0, description="side of the square that the digit fills, in pixels")
    shift: NonNegative = Field(default=3.0, description="training: largest random shift, in pixels")
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="training: largest random change of size, as a fraction"
    )
    rotation: NonNegative = Field(default=10.0, description="training: largest random rotation, in degrees")
    workers: Annotated[int, Field(ge=0)] = Field(default=0, description="data loading processes per process")


class ImageFolderData(_Section):
    """A folder with train/CLASS/IMAGE and val/CLASS/IMAGE, as ImageNet is usually laid out."""

    name: Literal["imagefolder"]
    root: str = Field(description="folder that holds train/ and val/")
    image_size: Count = Field(default=256, description="side of the square network input, in pixels")
    crop_pct: Annotated[float, Field(gt=0, le=1)] = Field(
        default=224 / 256, description="evaluation: centre crop's side over the resized short side"
    )
    interpolation: Literal["bilinear", "bicubic", "random"] = Field(default="bicubic", description="resizing filter")
    auto_augment: str | None = Field(
        default="rand-m9-mstd0.5-inc1", description="training: timm's policy string, null for none"
    )
    color_jitter: NonNegative = Field(
        default=0.4, description="training: colour jitter; timm applies it only where auto_augment is null"
    )
    hflip: Fraction = Field(default=0.5, description="training: probability of a horizontal flip")
    random_erasing: Fraction = Field(default=0.25, description="training: probability of random erasing (pixel)")
    repeats: Count = Field(
        default=1, description="training: times that an image is drawn in one epoch (repeated augmentation)"
    )
    workers: Annotated[int, Field(ge=0)] = Field(default=8, description="data loading processes per process")


class MixingConfig(_Section):
    """Mixup and CutMix, through timm. Both zero: no mixing."""

    mixup: NonNegative = Field(default=0.0, description="mixup's alpha, 0 for none")
    cutmix: NonNegative = Field(default=0.0, description="CutMix's alpha, 0 for none")
    prob: Fraction = Field(default=1.0, description="probability that a batch is mixed")
    switch_prob: Fraction = Field(default=0.5, description="probability of CutMix where both are on")


class OptimConfig(_Section):
    """The optimiser; biases, norms, position embedding and prefix tokens get no weight decay."""

    name: str = Field(default="adamw", description="an optimiser name known to timm")
    lr: Positive = Field(description="peak learning rate")
    lr_batch: Count | None = Field(
        default=None,
        description="images per step that lr is meant for: scaled linearly to the real number; null: lr as it is",
    )
    weight_decay: NonNegative = Field(default=0.05, description="decoupled weight decay")
    betas: tuple[Fraction, Fraction] | None = Field(
        default=None, strict=False, description="the optimiser's betas, null for its own default"
    )
    eps: Positive | None = Field(default=None, description="the optimiser's epsilon, null for its own default")
    clip_grad: Positive | None = Field(default=None, description="largest gradient norm, null for no clipping")


class ScheduleConfig(_Section):
    """Linear warm-up, then one cosine, both per optimiser step."""

    warmup_epochs: NonNegative = Field(default=0.0, description="epochs of linear warm-up")
    warmup_lr: NonNegative = Field(default=1e-6, description="learning rate at the first step of the warm-up")
    min_lr: NonNegative = Field(default=1e-5, description="learning rate that the cosine ends at")


class BudgetConfig(_Section):
    """The penalty weight * (ratio - target)^2 on the whole model's MACs; unused by models without routers."""

    target: Annotated[float, Field(gt=0, le=1)] = Field(default=0.5, description="aim for dynamic / dense MACs")
    weight: NonNegative = Field(default=1.0, description="the penalty's weight")
    noiseless_epochs: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="last epochs that route as evaluation does, without Gumbel noise, so that the ratio trained is "
        "the ratio evaluated",
    )


class TrainConfig(_Section):
    """The training loop."""

    epochs: Count = Field(description="passes over the training images")
    batch_size: Count = Field(description="images per process in one forward")
    accumulation_steps: Count = Field(default=1, description="forwards per optimiser step")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.1, description="label smoothing")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="decay of the weights' moving average, null for none"
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="the run's only source of randomness")
    device: Literal["auto", "cpu"] = Field(default="auto", description="cpu: leave accelerators alone")
    log_every: Count = Field(default=10, description="optimiser steps between two log lines")
    eval_every: Count = Field(default=1, description="epochs between two evaluations; the last is always evaluated")


class EvalConfig(_Section):
    """Evaluation on the held-out images."""

    batch_size: Count = Field(default=64, description="images per process in one forward")
    timing_rounds: Annotated[int, Field(ge=0)] = Field(
        default=10, description="forwards timed for images/s at the end, 0 for no timing"
    )


class CheckpointConfig(_Section):
    """What is kept in the run's checkpoints folder."""

    every_epochs: Count = Field(default=1, description="epochs between two checkpoints; the last is always kept")
    every_steps: Count | None = Field(default=None, description="also every so many optimiser steps, null for none")
    keep_last: Count = Field(default=2, description="newest checkpoints to keep; the best is kept beside them")


class OutputConfig(_Section):
    """Where the run writes."""

    dir: str = Field(description="the run's folder")
    trackers: tuple[str, ...] = Field(
        default=("tensorboard",), strict=False, description="experiment trackers, by Accelerate's names"
    )


class Config(_Section):
    """One run: ``dge-train --config`` reads it, ``config.yaml`` in the run's folder records it."""

    model: ModelConfig
    data: Annotated[DigitsData | ImageFolderData, Field(discriminator="name")]
    mixing: MixingConfig = MixingConfig()
    optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    budget: BudgetConfig = BudgetConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: OutputConfig
