"""torchvision's detectors, which pad images of several sizes to one batch: what an image gets must not depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dge_models.padding import Setting, checked_sizes, count_open, followers, settings

__all__ = ["PaddingHandle", "follow_padding", "same_sizes"]


class PaddingHandle:
    """Ends what :func:`follow_padding` began: by :meth:`remove`, or as a context manager."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self._handles = tuple(handles)

    def remove(self) -> None:
        """Let the detector pad as it does by itself; a second call does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> PaddingHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def follow_padding(detector: nn.Module) -> PaddingHandle:
    """What an image gets from a torchvision detector no longer depends on how much the detector padded it.

    .. code-block:: python

        detector = torchvision.models.detection.MaskRCNN(backbone, num_classes=91)
        dge_models.follow_padding(detector)

    In evaluation the detector runs images of one size together, one size after the other: sizes as its ``transform``
    resizes images, rounded up to its ``size_divisible``. So its neck and its heads see no other padding than that of
    an image alone, and neither do anchors, proposals and pooled regions. Detections come in the order of the images;
    :func:`collect_routings` collects one forward pass per size, in the order in which the sizes come.

    In training, where losses are means over the whole batch, images stay together. The models of this package inside
    run every image at its own size, as in :func:`padded`, and the detector's own layers see zeros in the padding of
    maps; those with biases carry them from there into an image's last cells, and anchors in the padding count as
    background.

    Nothing but three hooks is added, for the calls of the detector and this thread alone: a copy and a pickle of the
    detector have them too, weights have the names that they had, and :meth:`PaddingHandle.remove` takes them away.

    Args:
        detector: ``GeneralizedRCNN`` (Faster, Mask and Keypoint R-CNN), ``RetinaNet``, ``FCOS``, ``SSD``: a module
            whose ``transform`` returns an ``ImageList`` and targets. One whose transform has no ``resize`` of
            torchvision's runs all images together in evaluation too.

    Returns:
        What ends it.

    Raises:
        ValueError: The module has no ``transform``, or holds no model that follows padding.
    """
    transform = getattr(detector, "transform", None)
    if not isinstance(transform, nn.Module):
        raise ValueError(
            f"detector: got {type(detector).__name__}, which has no transform; expected a detector of torchvision's "
            "(where other code pads, use padded)"
        )
    followers(detector)
    return PaddingHandle(
        [
            detector.register_forward_pre_hook(_begin, with_kwargs=True),
            transform.register_forward_hook(_take_sizes),
            detector.register_forward_hook(_end, always_call=True),
        ]
    )


def same_sizes(detector: Any, images: Sequence[Any]) -> list[list[int]]:
    """Places of images that make batches of one size.

    Args:
        detector: Of torchvision's, in evaluation.
        images: [C, H, W] each.

    Returns:
        The places by size, in the order in which the sizes come; one list of all where that cannot be told.
    """
    transform = detector.transform
    if not hasattr(transform, "resize") or any(image.ndim != 3 for image in images):
        return [list(range(len(images)))]
    step, places = int(transform.size_divisible), dict[tuple[int, ...], list[int]]()
    for place, image in enumerate(images):
        resized, _ = transform.resize(torch.empty(image.shape, device="meta"))
        places.setdefault(tuple(-(-side // step) for side in resized.shape[1:]), []).append(place)
    return list(places.values())


# Functions of the module, so that detectors can be copied and pickled; they keep nothing of a detector.
def _begin(detector: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    # What is left of a call that was interrupted is dropped.
    _end(detector, None, None)
    given = dict(zip(("images", "targets"), arguments, strict=False)) | keywords
    groups = [] if detector.training or "images" not in given else same_sizes(detector, given["images"])
    calls = [
        {name: None if each is None else [each[place] for place in own] for name, each in given.items()}
        for own in groups
    ]
    result = None
    if len(groups) > 1:
        # All but the last size by calls of their own, which begin and end here.
        result = partial(_in_order, groups, [detector(**call) for call in calls[:-1]])
    setting = Setting(followers(detector), None, id(detector.transform), result)
    settings.set((*settings.get(), setting))
    count_open(1)
    return None if result is None else ((), calls[-1])


def _in_order(groups: Sequence[Sequence[int]], earlier: Sequence[Sequence[Any]], last: Sequence[Any]) -> list[Any]:
    """The detections of all images, from those of the groups."""
    places = [place for own in groups for place in own]
    found = [each for part in (*earlier, last) for each in part]
    return [each for _, each in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]


def _take_sizes(transform: nn.Module, _: Any, output: Any) -> None:
    sizes = checked_sizes(output[0].image_sizes)
    known = settings.get()
    settings.set(tuple(replace(each, sizes=sizes) if each.owner == id(transform) else each for each in known))


def _end(detector: Any, _: Any, output: Any) -> Any:
    known, owner = settings.get(), id(detector.transform)
    own = [each for each in known if each.owner == owner]
    if own:
        settings.set(tuple(each for each in known if each.owner != owner))
        count_open(-len(own))
    # There is no output where the detector raised an error.
    return own[-1].result(output) if own and own[-1].result is not None and output is not None else None
