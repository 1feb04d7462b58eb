"""What torch's counter of floating-point operations makes of the operators."""

import pytest
import torch
from cases import Case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import dge_kernels as dk

HEADS, WIDTH = 3, 16


def _counted(counter: FlopCounterMode) -> dict[str, int]:
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


def _leaves(*rows: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*shape, HEADS, WIDTH, requires_grad=True) for shape in rows]


def _dense(queries: int, keys: int) -> tuple[int, int]:
    """torch's own numbers for one image, forward and backward."""
    q, k = (1, HEADS, queries, WIDTH), (1, HEADS, keys, WIDTH)
    return sdpa_flop_count(q, k, k), sdpa_backward_flop_count(q, q, k, k)


def test_attention_of_equal_lengths_counts_as_torchs() -> None:
    q, k, v = _leaves((4 * 20,), (4, 33), (4, 33))
    ends = torch.arange(0, 81, 20, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        dk.ragged_attention(q, k, v, cu_seqlens_q=ends).sum().backward()
    heads = [t.detach().unflatten(0, (4, -1)) if t is q else t.detach() for t in (q, k, v)]
    batch = [t.transpose(1, 2).to("meta") for t in heads]
    with FlopCounterMode(display=False) as torchs:
        torch.ops.aten._scaled_dot_product_flash_attention(*batch)
    forward = torchs.get_total_flops()
    assert forward == 4 * _dense(20, 33)[0] > 0
    assert _counted(counter) == {
        "dge_kernels.ragged_attention": forward,
        "dge_kernels.ragged_attention_backward": 4 * _dense(20, 33)[1],
    }


@pytest.mark.parametrize("biased", [False, True])
def test_packed_keys_count_by_image(biased: bool) -> None:
    queries, keys = [5, 0, 40], [7, 9, 30]
    q, k, v = _leaves((45,), (46,), (46,))
    bias = torch.zeros(46, requires_grad=True) if biased else None
    ends = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
    with FlopCounterMode(display=False) as counter:
        dk.ragged_attention(q, k, v, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], bias=bias).sum().backward()
    each = [_dense(a, b) for a, b in zip(queries, keys, strict=True)]
    assert list(_counted(counter).values()) == [sum(forward for forward, _ in each), sum(back for _, back in each)]


def test_packed_keys_count_as_if_alike_where_lengths_are_unknown() -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k, ends = torch.empty(40, HEADS, WIDTH), torch.empty(60, HEADS, WIDTH), torch.empty(5, dtype=torch.int32)
        dk.ragged_attention(q, k, k, cu_seqlens_q=ends, cu_seqlens_k=ends)
    assert counter.get_total_flops() == 4 * _dense(10, 15)[0]


def test_route_counts_as_a_linear_layer() -> None:
    case = Case((7, 9), batch=2)
    x, weight, bias = case.tokens(), torch.randn(3, case.channels), torch.randn(3)
    with FlopCounterMode(display=False) as counter:
        dk.route(x, weight, bias, grid=case.grid, num_prefix_tokens=case.prefix)
    with FlopCounterMode(display=False) as torchs:
        torch.nn.functional.linear(torch.randn(2 * 2 * 3, case.channels), weight, bias)
    assert counter.get_total_flops() == torchs.get_total_flops() > 0


def test_pooling_multiplies_no_matrices() -> None:
    case = Case((7, 9))
    with FlopCounterMode(display=False) as counter:
        plan = case.plan()
        x = case.tokens()
        dk.unpool_queries(dk.pool_queries(x, plan), plan, x)
    assert counter.get_total_flops() == 0
