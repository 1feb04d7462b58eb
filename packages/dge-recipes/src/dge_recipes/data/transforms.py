"""Timm's transforms: the same pictures with every release of Pillow, and errors that say which step failed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform
from torch import Tensor

from dge_recipes.data.decoding import TransformError, in_one_line
from dge_recipes.data.section import ImageData
from dge_recipes.errors import UserError
from dge_recipes.randomness import isolated_seed

__all__ = ["Transform", "evaluation_transform", "training_transform"]


class Transform:
    """Steps from a picture to a tensor, in their order.

    The operations of an augmentation policy among them are changed in place, each of them alone: neither timm nor
    other policies notice.

    Args:
        steps: as timm's factory puts them together.
    """

    def __init__(self, steps: Any) -> None:
        self.transforms = list(steps.transforms)
        for step in self.transforms:
            for operation in _operations(step):
                _watch(operation)

    def __call__(self, picture: Image.Image) -> Tensor:
        """Apply the steps.

        Raises:
            TransformError: one of them failed.
            MemoryError: the machine has too little.
        """
        value: Any = picture
        for step in self.transforms:
            with _blame(type(step).__name__):
                value = step(value)
        result: Tensor = value
        return result


def training_transform(config: ImageData) -> Transform:
    """Timm's training transform for this config: random crop, flip, augmentation policy, erasing.

    Raises:
        UserError: timm does not know the policy, or it cannot be applied to any picture.
    """
    try:
        steps = create_transform(
            config.image_size,
            is_training=True,
            scale=config.crop_scale,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            re_prob=config.random_erasing,
            re_mode="pixel",
            mean=config.mean,
            std=config.std,
        )
    except (AssertionError, LookupError, ValueError) as error:
        expected = "expected a policy of timm's, such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0"
        raise UserError(f"data.auto_augment: got {config.auto_augment!r}, {expected}") from error
    transform = Transform(steps)
    try:  # timm takes policies that fail at each draw, such as more operations than there are
        with isolated_seed(0):
            transform(Image.new("RGB", (8, 8)))
    except TransformError as error:
        raise UserError(f"data.auto_augment: {config.auto_augment!r} fails on a plain picture: {error}") from error
    return transform


def evaluation_transform(config: ImageData) -> Transform:
    """Timm's evaluation transform: resize the short side, crop the centre, normalise."""
    interpolation = "bicubic" if config.interpolation == "random" else config.interpolation
    return Transform(
        create_transform(
            config.image_size,
            interpolation=interpolation,
            crop_pct=config.crop_pct,
            mean=config.mean,
            std=config.std,
        )
    )


@contextmanager
def _blame(step: str) -> Iterator[None]:
    """Inside ``with``, an error becomes a :class:`TransformError` that names the step."""
    try:
        yield
    except (TransformError, MemoryError):
        raise
    except Exception as error:
        raise TransformError(f"{step}: {in_one_line(error)}") from error


def _operations(step: Any) -> Iterator[Any]:
    """The ``AugmentOp`` of RandAugment and AugMix, and of AutoAugment's sub-policies."""
    yield from getattr(step, "ops", ())
    for part in getattr(step, "policy", ()):
        yield from part


def _watch(operation: Any) -> None:
    """Have an operation say what failed, and do what it did with every release of Pillow."""
    if operation.level_fn is not None:
        operation.level_fn = _Level(operation.level_fn)
    operation.aug_fn = _Operation(operation.name, _MENDED.get(operation.aug_fn, operation.aug_fn))


class _Level:
    """From a level to an operation's arguments, the level itself before them."""

    def __init__(self, to_arguments: Callable[..., tuple[Any, ...]]) -> None:
        self._to_arguments = to_arguments

    def __call__(self, level: float, settings: dict[str, Any]) -> tuple[Any, ...]:
        return (level, *self._to_arguments(level, settings))


class _Operation:
    """An operation that names itself and its level where it fails; some have none."""

    def __init__(self, name: str, function: Callable[..., Image.Image]) -> None:
        self._name, self._function = name, function

    def __call__(self, picture: Image.Image, *arguments: Any, **options: Any) -> Image.Image:
        told = self._name
        if arguments:
            level, *rest = arguments
            told += f" at level {level:.4g} ({', '.join(str(each) for each in rest)})"
        with _blame(told):
            return self._function(picture, *arguments[1:], **options)


def _posterize(picture: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Without a bit to keep: black. Timm's strongest levels ask for it, and Pillow refuses since 13."""
    if bits < 1:
        return Image.new(picture.mode, picture.size)
    result: Image.Image = auto_augment.posterize(picture, bits, **options)
    return result


_MENDED: dict[Callable[..., Image.Image], Callable[..., Image.Image]] = {auto_augment.posterize: _posterize}
