"""Peers: the published way to merge, and what is compared at equal time."""

from typing import Any

import pytest
import timm
import torch

from dge_recipes.benchmark import Measurement
from dge_recipes.compress.fidelity import Fidelity
from dge_recipes.peers import Peer, compare_peers, make_peers, peers_table, published_merging


@pytest.fixture(scope="module")
def dense() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=128, depth=4, embed_dim=24, num_heads=2).eval()


def test_as_many_merges_in_every_layer(dense: Any) -> None:
    merged: Any = published_merging(dense, 0.7, torch.zeros(1, 3, 128, 128))
    counts = [block.count for block in merged.blocks]
    assert counts[0] == counts[1] > 0
    left = 64
    for count in counts:
        assert count == min(counts[0], left // 2)  # until half of what is left
        left -= count
    with pytest.raises(ValueError, match=r"got 0\.05; the nearest .* is 0\.\d"):
        published_merging(dense, 0.05, torch.zeros(1, 3, 128, 128))


def test_every_method_at_every_ratio(dense: Any) -> None:
    batches = [torch.rand(4, 3, 128, 128)]
    peers, models, reasons = make_peers(dense, [0.9, 0.01], batches, batches)
    assert {peer.name for peer in peers} == set(models)
    assert {"merge, published 0.9", "merge, ragged 0.9"} <= set(models)
    assert set(reasons) >= {"merge, published 0.01", "merge, ragged 0.01", "DGE (2,1), fitted 0.01"}
    assert all(0.8 < peer.fidelity.mac_ratio < 1 for peer in peers)


def test_pictures_are_taken_in_turn(dense: Any) -> None:
    seen: list[torch.Tensor] = []

    class Watched(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images[:, 0, 0, 0])
            return images

    pictures = [torch.arange(5.0).view(5, 1, 1, 1)[:3], torch.arange(5.0).view(5, 1, 1, 1)[3:]]
    compare_peers(Watched().eval(), {}, pictures, [2], backend=None, rounds=5, dtype=torch.float32)
    assert [turn.tolist() for turn in seen[-5:]] == [[4, 0], [1, 2], [3, 4], [0, 1], [2, 3]]


def _peer(method: str, asked: float, cosine: float) -> Peer:
    return Peer(method, asked, Fidelity(asked, cosine, 0.9, None), 1.0)


def _timed(model: str, milliseconds: float) -> Measurement:
    return Measurement(model, "eager", 1, 1e3 / milliseconds, milliseconds, milliseconds, None)


def test_fidelity_at_equal_time() -> None:
    peers = [_peer("a", 0.6, 0.99), _peer("b", 0.7, 0.999), _peer("b", 0.5, 0.9), _peer("c", 0.5, 0.8)]
    times = [_timed("dense", 30), _timed("a 0.6", 20), _timed("b 0.7", 30), _timed("b 0.5", 15), _timed("c 0.5", 10)]
    lines = peers_table(peers, times, {"c 0.1": "out of reach"}).splitlines()
    assert "| a | 0.600 | 0.9900 | 0.9000 | 1.67x | 1.50x |" in lines
    assert "c 0.1: no model: out of reach" in lines
    # b reaches 1.5 times between 1 time (error 0.001) and 2 times (error 0.1): their geometric mean.
    assert lines[-1] == "| batch 1, eager | 1.50x | 0.9900 | 0.9900 | out of reach |"
