from __future__ import annotations

import threading
from typing import Any

import torch
from small_models import Build
from torch import nn

from dge_models.listening import listeners, listening_to
from dge_models.routed import routed_blocks


class Ear:
    def __init__(self, wanted: nn.Module) -> None:
        self.wanted = wanted
        self.heard: list[Any] = []

    def listens_to(self, block: nn.Module) -> bool:
        return block is self.wanted

    def add(self, block: nn.Module, routing: Any) -> None:
        self.heard.append((block, routing))


def test_only_those_who_want_a_block_in_this_thread_are_told(small: Build) -> None:
    model, images = small(), torch.randn(1, 3, 32, 32)
    first, second, _ = routed_blocks(model)
    ear, others = Ear(second), []
    token = listeners.set((ear,))
    try:
        assert listening_to(second) == (ear,)
        assert listening_to(first) == ()
        thread = threading.Thread(target=lambda: others.append(listening_to(second)))
        thread.start()
        thread.join()
        expected = model.forward_routed(images)[1][1]
        assert model(images).shape == (1, 7)
    finally:
        listeners.reset(token)
    model(images)
    assert others == [()]
    assert [block for block, _ in ear.heard] == [second, second]
    assert all(torch.equal(routing.choice, expected.choice) for _, routing in ear.heard)


def test_a_backward_pass_is_not_listened_to(small: Build) -> None:
    block, seen = routed_blocks(small())[0], []
    token = listeners.set((Ear(block),))
    try:
        x = torch.ones(1, requires_grad=True)
        y = x * 2
        y.register_hook(lambda _: seen.append(listening_to(block)))
        y.sum().backward()
    finally:
        listeners.reset(token)
    assert seen == [()]
