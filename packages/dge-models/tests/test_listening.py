from __future__ import annotations

import threading
from typing import Any

import torch
from small_models import Build
from torch import nn

from dge_models import listening
from dge_models.listening import heard_by
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
    blocks = routed_blocks(model)
    ear, other = Ear(blocks[1]), Ear(blocks[2])
    with torch.no_grad():
        expected = model.forward_routed(images)[1]
        with heard_by(ear):
            thread = threading.Thread(target=torch.inference_mode()(model), args=(images,))
            thread.start()
            thread.join()
            assert ear.heard == []
            assert model(images).shape == (1, 7)
            with heard_by(other):
                model(images)
            assert listening.in_use
        model(images)
    assert not listening.in_use
    assert [block for block, _ in ear.heard] == [blocks[1]] * 2
    assert [block for block, _ in other.heard] == [blocks[2]]
    assert all(torch.equal(routing.choice, expected[1].choice) for _, routing in ear.heard)


def test_a_backward_pass_is_not_listened_to(small: Build) -> None:
    model, images = small(), torch.randn(1, 3, 32, 32)
    block = routed_blocks(model)[0]
    ear, ran = Ear(block), []

    def run(gradient: Any) -> None:
        with torch.no_grad():
            ran.append(model(images))

    with heard_by(ear):
        x = torch.ones(1, requires_grad=True)
        y = x * 2
        y.register_hook(run)
        y.sum().backward()
    assert len(ran) == 1
    assert ear.heard == []
