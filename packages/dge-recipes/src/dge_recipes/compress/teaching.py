"""What the dense model says of crops, and how far a copy is from it: at its end and on the way there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dge_models
from dge_recipes.compress.crops import Crops
from dge_recipes.compress.fidelity import Answers, answers_of
from dge_recipes.randomness import derive_seed

__all__ = ["Manner", "Taught", "Teacher", "answer_loss", "kept_routing", "outputs_of_blocks"]

_LOOKED_AT = 4  # blocks, evenly spaced, the last one among them
_AT_FIRST = 8  # batches that are all asked before any comes again
_MOST = 48  # batches that are kept; a newer one takes the place of the oldest


@dataclass(frozen=True)
class Manner:
    """How a copy is taught; ``python -m benchmarks.pretrained.distillation --manner`` compares other ways.

    Attributes:
        blocks: weight of what the tokens after four blocks are off, beside the answers.
        times: that a batch is learned from, on average.
        varied: crops of very different scales and colours, see :meth:`Crops.varied`.
        average: what a running average of the learned parameters keeps of itself at a step; it is what is evaluated
            and handed out. 0: the parameters themselves.
        matrices: learning rate of matrices, where they learn, over that of norms, biases and layer scales.
        flat: share of the time, less than 1, after which learning rates begin to fall to nothing.
        half: multiply matrices in bfloat16 where the processor does.
    """

    blocks: float = 0.2
    times: int = 3
    varied: bool = True
    average: float = 0.97
    matrices: float = 0.02
    flat: float = 0.6
    half: bool = True

    def __post_init__(self) -> None:
        """Refuse a share that none of the time is left after."""
        if not 0 <= self.flat < 1:
            raise ValueError(f"flat: got {self.flat}; expected at least 0 and less than 1")


@dataclass(frozen=True)
class Taught:
    """A batch of B crops, and what the dense model says of them.

    Attributes:
        images: [B, 3, H, W].
        answers: as of :func:`answers_of`.
        blocks: [B, T + N, C] each, the tokens after the blocks that are looked at, each channel over its spread.
    """

    images: Tensor
    answers: Answers
    blocks: tuple[Tensor, ...]


class Teacher:
    """The dense model, asked once for what is learned from several times: its answer costs more than a step.

    Args:
        dense: in evaluation mode.
        crops: to ask for.
        batch_size: crops per batch.
        manner: of teaching.
    """

    def __init__(self, dense: nn.Module, crops: Crops, batch_size: int, manner: Manner) -> None:
        self._dense, self._batch_size, self._manner = dense, batch_size, manner
        self._crops = crops.varied() if manner.varied else crops
        self._device = next(dense.parameters()).device
        self._known: list[Taught] = []
        self._uses: list[int] = []
        self._asked = 0
        self._spreads: list[Tensor] = []

    def batch(self, step: int) -> Taught:
        """What a step learns from: at first something new, and then as seldom as the manner says."""
        if step % self._manner.times == 0 or len(self._known) < _AT_FIRST:
            return self._ask()
        seldom = [place for place, uses in enumerate(self._uses) if uses == min(self._uses)]
        generator = torch.Generator().manual_seed(derive_seed(0, "again", step))
        place = seldom[int(torch.randint(len(seldom), (), generator=generator))]
        self._uses[place] += 1
        return self._known[place]

    def loss(self, model: nn.Module, taught: Taught) -> Tensor:
        """How far a copy is from what the dense model says: float32 [], differentiable.

        To :func:`answer_loss` comes what the tokens after four blocks are off, squared, in units of each channel's
        spread: the mean over the prefix tokens and that over the others, times the manner's weight.
        """
        with outputs_of_blocks(model, _looked_at(model)) as outputs:
            loss = answer_loss(answers_of(model, taught.images), taught.answers)
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        for tokens, wanted, spread in zip(outputs, taught.blocks, self._spreads, strict=True):
            wrong = (tokens.float() / spread - wanted.float()).square()
            parts = (wrong[:, :prefix], wrong[:, prefix:]) if prefix else (wrong,)
            loss = loss + self._manner.blocks * sum(part.mean() for part in parts)
        return loss

    def _ask(self) -> Taught:
        images = self._crops.batch(self._asked, self._batch_size).to(self._device)
        with torch.no_grad(), outputs_of_blocks(self._dense, _looked_at(self._dense)) as outputs:
            answers = answers_of(self._dense, images)
        if not self._spreads:
            prefix = int(getattr(self._dense, "num_prefix_tokens", 0))
            self._spreads = [tokens[:, prefix:].float().std((0, 1)).clamp(min=1e-6) for tokens in outputs]
        blocks = tuple((tokens / spread).half() for tokens, spread in zip(outputs, self._spreads, strict=True))
        taught = Taught(images, answers, blocks)
        if len(self._known) < _MOST:
            self._known.append(taught)
            self._uses.append(1)
        else:
            self._known[self._asked % _MOST], self._uses[self._asked % _MOST] = taught, 1
        self._asked += 1
        return taught


def answer_loss(answers: Answers, expected: Answers) -> Tensor:
    """How far the answers of a copy are from the dense model's.

    Args:
        answers: of the copy, differentiable.
        expected: the dense model's for the same pictures, without gradient.

    Returns:
        float32 [], the mean over the pictures of one minus the cosine of the class token (or pooled features), and
        beside it of the divergence of the classes in nats, or without classes of one minus the tokens' cosine.
    """
    vector = 1 - F.cosine_similarity(answers.vector.float(), expected.vector.float(), dim=-1).mean()
    if answers.logits is None or expected.logits is None:
        return vector + 1 - F.cosine_similarity(answers.tokens.float(), expected.tokens.float(), dim=-1).mean()
    known, wanted = answers.logits.float().log_softmax(-1), expected.logits.float().log_softmax(-1)
    return vector + F.kl_div(known, wanted, reduction="batchmean", log_target=True)


def _looked_at(model: Any) -> list[int]:
    depth = len(model.blocks)
    return sorted({depth * (number + 1) // _LOOKED_AT - 1 for number in range(_LOOKED_AT)} - {-1})


@contextmanager
def outputs_of_blocks(model: Any, indices: list[int]) -> Iterator[list[Tensor]]:
    """Collect the tokens after some blocks, in their order, of the one forward pass that is made inside.

    Args:
        model: with ``blocks``, dense or routed.
        indices: of the blocks.

    Yields:
        A list that the tokens [B, T + N, C] are appended to.
    """
    found: list[Tensor] = []

    def keep(block: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.blocks[index].register_forward_hook(keep) for index in indices]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def kept_routing(model: nn.Module) -> Iterator[None]:
    """Inside, no gradient flows to tokens through the choice of their split.

    Routers that stay as they are cannot follow it, and a straight-through gradient is a guess.

    Args:
        model: a routed copy.
    """

    def detach(router: nn.Module, arguments: Any, routing: Any) -> Any:
        return replace(routing, gate=routing.gate.detach(), queries=routing.queries.detach())

    routers = [module for module in model.modules() if isinstance(module, dge_models.Router)]
    handles = [router.register_forward_hook(detach) for router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
