"""Merging of similar tokens: who merges with whom, the merged tokens, and the way back to the whole grid.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023: bipartite matching on the keys, means weighted by
size, and the logarithm of the size as a bias of attention. Ours are the packed groups, as many as each image needs, and
the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Groups", "Match", "Step", "match", "merge", "restore", "select_above", "select_most", "single_tokens"]


@dataclass(frozen=True)
class Groups:
    """The groups of B images' tokens, packed image after image, prefix tokens first, then in the order of the grid.

    Attributes:
        image: int64 [G], the image of each group.
        sizes: float32 (float64 for float64 tokens) [G], tokens per group.
        lengths: int64 [B], groups per image.
        longest: The largest of `lengths`, or all of them where `even`.
        batch: B.
        num_prefix_tokens: T, of each image; they are never merged.
        even: Whether all images have `longest` groups by construction, so that shapes depend on no value.
        merged: Whether any size may differ from 1.
    """

    image: Tensor
    sizes: Tensor
    lengths: Tensor
    longest: int
    batch: int
    num_prefix_tokens: int
    even: bool
    merged: bool = False

    @property
    def dense(self) -> bool:
        """Whether all images have as many groups, by construction or because there is one image."""
        return self.even or self.batch == 1

    @property
    def starts(self) -> Tensor:
        """int64 [B], the first group of each image."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [B + 1], as the kernels take it."""
        return F.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    @property
    def places(self) -> Tensor:
        """int64 [G], the place of each group among its image's that may be merged; negative for prefix tokens."""
        every = torch.arange(self.image.shape[0], device=self.image.device)
        return every - self.starts[self.image] - self.num_prefix_tokens


@dataclass(frozen=True)
class Match:
    """Groups at even places, each with the most similar group at an odd place of its image.

    Attributes:
        similarity: float32 [G], cosine of their keys; -inf for groups at odd places, prefix tokens,
            lonely ones and those beyond the limit.
        partner: int64 [G], the other group; for those without one something in range.
    """

    similarity: Tensor
    partner: Tensor


@dataclass(frozen=True)
class Step:
    """What one merging did, for the way back.

    Attributes:
        before: [G, C] tokens.
        after: [G', C] tokens.
        group: int64 [G], which of the G' each became.
    """

    before: Tensor
    after: Tensor
    group: Tensor


def single_tokens(x: Tensor, num_prefix_tokens: int, *, even: bool) -> Groups:
    """Every token is a group of its own.

    Args:
        x: [B, N, C].
        num_prefix_tokens: T.
        even: Whether every image will lose equally many.
    """
    batch, tokens = x.shape[:2]
    image = torch.arange(batch * tokens, device=x.device) // tokens
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sizes = torch.ones(batch * tokens, device=x.device, dtype=wide)
    lengths = torch.full((batch,), tokens, device=x.device)
    return Groups(image, sizes, lengths, tokens, batch, num_prefix_tokens, even)


def match(keys: Tensor, groups: Groups, limit: int | None = None) -> Match | None:
    """Find a partner for every second group of each image.

    The similarities of an image are one small matrix product. Nothing of an image depends on its neighbours.

    Args:
        keys: [G, h, d], of the attention in front; their mean over the heads is compared.
        groups: G of them.
        limit: So many groups of an image may merge, those that are most similar to their partners.

    Returns:
        None if no image has two groups that may be merged.
    """
    most = groups.longest - groups.num_prefix_tokens
    if most < 2:
        return None
    # The cosine of sums is that of means.
    directions = F.normalize(keys.sum(1, dtype=groups.sizes.dtype), dim=-1)
    return (_match_dense if groups.dense else _match_packed)(directions, groups, most, limit)


def _match_dense(directions: Tensor, groups: Groups, most: int, limit: int | None) -> Match:
    """Where all images have as many groups, which stand in a table as they are."""
    batch, prefix = groups.batch, groups.num_prefix_tokens
    table = directions.view(batch, groups.longest, -1)[:, prefix:]
    best, other = _most_similar(table, limit)
    first = torch.arange(batch, device=best.device).unsqueeze(1) * groups.longest
    # Every second group after the prefix tokens asks, the first of them first.
    similarity = torch.stack([best, torch.full_like(best, -torch.inf)], -1).flatten(1)[:, :most]
    partner = (first + prefix + 1 + 2 * other).repeat_interleave(2, dim=1)[:, :most]
    return Match(F.pad(similarity, (prefix, 0), value=-torch.inf).flatten(), F.pad(partner, (prefix, 0)).flatten())


def _match_packed(directions: Tensor, groups: Groups, most: int, limit: int | None) -> Match:
    """Where images have groups of their own number: those of fewer leave some of the table unused."""
    places, image, batch = groups.places, groups.image, groups.batch
    row = torch.where(places < 0, batch * most, image * most + places)
    table = directions.new_zeros(batch * most + 1, directions.shape[1])
    table = table.index_copy(0, row, directions)[:-1].view(batch, most, -1)
    best, other = _most_similar(table, limit, (groups.lengths - groups.num_prefix_tokens).div(2, rounding_mode="floor"))
    row = image * ((most + 1) // 2) + places.clamp_min(0).div(2, rounding_mode="floor")
    asks = (places >= 0) & (places % 2 == 0)
    partner = groups.starts[image] + groups.num_prefix_tokens + 2 * other.flatten()[row] + 1
    return Match(torch.where(asks, best.flatten()[row], -torch.inf), partner)


def _most_similar(table: Tensor, limit: int | None, odd: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each even row its largest product with an odd one, and which.

    Args:
        table: [B, M, d].
        limit: So many of the ⌈M/2⌉ largest stay, the others become -inf.
        odd: int64 [B], how many of an image's ⌊M/2⌋ odd rows there are; None: all.

    Returns:
        [B, ⌈M/2⌉] and int64 of that shape.
    """
    similarity = table[:, 0::2] @ table[:, 1::2].transpose(1, 2)
    if odd is not None:
        present = torch.arange(similarity.shape[2], device=table.device) < odd.unsqueeze(1)
        similarity = similarity.masked_fill(~present.unsqueeze(1), -torch.inf)
    best, other = similarity.max(-1)
    if limit is not None and limit < best.shape[1]:
        best = best.masked_fill(best < best.topk(limit, dim=1).values[:, -1:], -torch.inf)
    return best, other


def select_above(found: Match, threshold: float) -> Tensor:
    """bool [G]: groups that are more similar to their partner than `threshold`."""
    return found.similarity > threshold


def select_most(found: Match, groups: Groups, count: int) -> Tensor:
    """bool [G]: in every image the `count` groups that are most similar to their partners; all shapes are static.

    Args:
        found: From :func:`match`.
        groups: With as many groups in every image.
        count: At most half of the groups that may be merged.
    """
    similarity = found.similarity.view(groups.batch, groups.longest)
    chosen = similarity.topk(count, dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter(1, chosen, True).flatten()


def merge(x: Tensor, groups: Groups, found: Match, selected: Tensor, count: int | None = None) -> tuple[Step, Groups]:
    """Merge groups into their partners, as means weighted by size.

    Args:
        x: [G, C] tokens.
        groups: G of them.
        found: From :func:`match`.
        selected: bool [G], which groups merge.
        count: How many do in every image, where that is known; no value is read then.

    Returns:
        What happened, and the groups that are left.
    """
    every = torch.arange(x.shape[0], device=x.device)
    kept = ~selected
    number = kept.long().cumsum(0) - 1
    group = number[torch.where(selected, found.partner, every)]
    if groups.batch == 1:
        lengths = number[-1:] + 1
    else:
        lengths = groups.lengths.index_add(0, groups.image, selected.long(), alpha=-1)
    if count is not None:
        longest = groups.longest - count
        total = groups.batch * longest
    elif groups.batch == 1:
        total = longest = int(lengths)
    else:
        total, longest = torch.stack([lengths.sum(), lengths.max()]).tolist()
    sizes = groups.sizes.new_zeros(total).index_add(0, group, groups.sizes)
    # A group that takes in none has a weight of exactly 1.
    shares = (groups.sizes / sizes[group]).unsqueeze(1)
    weighted = x * shares
    after = weighted.new_zeros(total, x.shape[1]).index_add(0, group, weighted).to(x.dtype)
    image = (
        groups.image[:total] if groups.batch == 1 else groups.image.new_zeros(total).index_copy(0, group, groups.image)
    )
    left = Groups(image, sizes, lengths, longest, groups.batch, groups.num_prefix_tokens, groups.even, merged=True)
    return Step(x, after, group), left


def restore(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """Every token again: what it was when it was merged, plus what its group has changed since.

    So tokens of one group keep what sets them apart, and where nothing merged, nothing is different.

    Args:
        x: [G, C] tokens after the last step.
        steps: What merged, first to last.

    Returns:
        [B·N, C].
    """
    for step in reversed(steps):
        x = step.before + (x - step.after)[step.group]
    return x
