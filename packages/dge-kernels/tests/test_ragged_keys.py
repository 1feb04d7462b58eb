"""Attention over packed keys and with a bias per key: images of several sizes, merged tokens, masked keys."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CASES, Case, assert_close, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dge_kernels as dk
from dge_kernels import _varlen, reference

CPU = torch.device("cpu")


def _ends(lengths: list[int], device: torch.device = CPU) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _leaves(*shapes: tuple[int, ...], device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def _check_against_the_definition(inputs: list[Tensor], slack: float = 2, **arguments: Any) -> Tensor:
    """Result and gradients of q, k, v and, where there is a fourth input, of the bias."""
    exact = wide(*inputs)
    both = []
    for attend, (q, k, v, *bias) in ((dk.ragged_attention, inputs), (reference.ragged_attention, exact)):
        both.append(attend(q, k, v, bias=bias[0] if bias else None, **arguments))
    out, expected = both
    assert_close(out, expected)
    grad = torch.randn(out.shape).to(out)
    out.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(inputs, exact, strict=True):
        if theirs.grad is not None:  # without images or keys the reference does not touch all of them
            assert_close(ours.grad, theirs.grad, slack)
    return out


@pytest.mark.parametrize("bias", [None, "key", "head"])
@pytest.mark.parametrize(("heads", "width"), [(2, 64), (3, 20), (1, 1)])
def test_packed_keys(heads: int, width: int, bias: str | None, device: torch.device, dtype: torch.dtype) -> None:
    queries, keys = [5, 70, 0, 1, 33], [40, 3, 7, 1, 260]
    shapes = [(sum(queries), heads, width), *[(sum(keys), heads, width)] * 2]
    shapes += [] if bias is None else [(sum(keys),) if bias == "key" else (sum(keys), heads)]
    inputs = _leaves(*shapes, device=device, dtype=dtype)
    ends = {"cu_seqlens_q": _ends(queries, device), "cu_seqlens_k": _ends(keys, device)}
    out = _check_against_the_definition(inputs, **ends, max_seqlen_q=70, max_seqlen_k=260)
    assert out.dtype == dtype
    assert all(tensor.grad.dtype == dtype for tensor in inputs)


@pytest.mark.parametrize("bias", ["key", "head"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_dense_keys_with_a_bias(case: Case, bias: str, device: torch.device, dtype: torch.dtype) -> None:
    plan = case.plan(device)
    keys = (plan.batch_size, 17, 2, 32)
    shapes = [(plan.total, 2, 32), keys, keys, keys[:2] if bias == "key" else keys[:3]]
    _check_against_the_definition(_leaves(*shapes, device=device, dtype=dtype), plan=plan)


@pytest.mark.parametrize("biased", [False, True])
def test_packed_keys_of_equal_lengths_have_the_bits_of_dense_ones(
    biased: bool, device: torch.device, dtype: torch.dtype
) -> None:
    plan = Case((9, 7), batch=4).plan(device)
    q, k, v, bias = _leaves((plan.total, 3, 40), (4, 50, 3, 40), (4, 50, 3, 40), (4, 50), device=device, dtype=dtype)
    inputs = [q, k, v, *([bias] if biased else [])]
    dense = dk.ragged_attention(q, k, v, plan, bias=bias if biased else None)
    packed = dk.ragged_attention(
        q,
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=plan.cu_seqlens,
        cu_seqlens_k=_ends([50] * 4, device),
        bias=bias.flatten() if biased else None,
        max_seqlen_q=plan.max_seqlen,
        max_seqlen_k=50,
    )
    assert torch.equal(packed, dense)
    grad = torch.randn_like(dense)
    if device.type == "cpu" or dtype in (torch.float32, torch.float64):  # torch's varlen is not deterministic backwards
        for a, b in zip(
            torch.autograd.grad(packed, inputs, grad), torch.autograd.grad(dense, inputs, grad), strict=True
        ):
            assert torch.equal(a, b)


def test_a_bias_of_zeros_changes_no_bit() -> None:
    plan = Case((9, 7), batch=4).plan()
    q, k, v = _leaves((plan.total, 3, 40), (4, 50, 3, 40), (4, 50, 3, 40))
    plain = dk.ragged_attention(q, k, v, plan)
    biased = dk.ragged_attention(q, k, v, plan, bias=torch.zeros(4, 50))
    assert torch.equal(plain, biased)


def test_an_image_does_not_depend_on_its_batch() -> None:
    queries, keys = [30, 100, 2], [77, 5, 300]
    q, k, v, bias = (t.detach() for t in _leaves((132, 2, 24), (382, 2, 24), (382, 2, 24), (382, 2)))
    together = dk.ragged_attention(q, k, v, cu_seqlens_q=_ends(queries), cu_seqlens_k=_ends(keys), bias=bias)
    parts = [t.split(lengths) for t, lengths in ((q, queries), (k, keys), (v, keys), (bias, keys))]
    for image, out in enumerate(together.split(queries)):
        a, b, c, d = (part[image] for part in parts)
        arguments = {"cu_seqlens_q": _ends([len(a)]), "cu_seqlens_k": _ends([len(b)])}
        assert torch.equal(dk.ragged_attention(a, b, c, bias=d, **arguments), out)


def test_a_bias_of_log_sizes_stands_for_repeated_keys(device: torch.device) -> None:
    """Proportional attention, as token merging needs it."""
    sizes = torch.tensor([1, 4, 2, 1, 3], device=device)
    q, k, v = (t.detach() for t in _leaves((6, 2, 16), (5, 2, 16), (5, 2, 16), device=device))
    ends = {"cu_seqlens_q": _ends([2, 4], device)}
    merged = dk.ragged_attention(q, k, v, **ends, cu_seqlens_k=_ends([3, 2], device), bias=sizes.log())
    repeated = dk.ragged_attention(
        q, k.repeat_interleave(sizes, 0), v.repeat_interleave(sizes, 0), **ends, cu_seqlens_k=_ends([7, 4], device)
    )
    assert_close(merged, repeated.double())


@pytest.mark.parametrize("dense", [False, True])
def test_masked_keys_have_no_part(dense: bool, device: torch.device) -> None:
    q, k, v = (t.detach().requires_grad_() for t in _leaves((9, 2, 16), (24, 2, 16), (24, 2, 16), device=device))
    bias = torch.zeros(24, device=device)
    bias[[3, 4, 10]] = -torch.inf
    bias[16:] = -torch.inf  # the last image has no key left
    bias.requires_grad_()
    arguments: dict[str, Any] = {"cu_seqlens_q": _ends([3, 4, 2], device)}
    if dense:
        out = dk.ragged_attention(q, *(t.view(3, 8, 2, 16) for t in (k, v)), bias=bias.view(3, 8), **arguments)
    else:
        out = dk.ragged_attention(q, k, v, bias=bias, cu_seqlens_k=_ends([8, 8, 8], device), **arguments)
    kept = bias.detach() == 0
    few = dk.ragged_attention(q, k[kept], v[kept], **arguments, cu_seqlens_k=_ends([6, 7, 0], device))
    assert_close(out, few.double())
    assert not bool(out[7:].any())
    grads = torch.autograd.grad(out.square().sum(), (q, k, v, bias))
    for ours, theirs in zip(grads, torch.autograd.grad(few.square().sum(), (q, k, v)), strict=False):
        assert_close(ours, theirs.double())
    assert not bool(grads[3][~kept].any())
    assert not bool(grads[1][~kept].any())


@pytest.mark.parametrize("keys", [[0, 6, 0], [0, 0, 0]])
def test_an_image_without_keys_gives_zeros(keys: list[int], device: torch.device, dtype: torch.dtype) -> None:
    inputs = _leaves((9, 2, 16), (sum(keys), 2, 16), (sum(keys), 2, 16), device=device, dtype=dtype)
    ends = {"cu_seqlens_q": _ends([2, 4, 3], device), "cu_seqlens_k": _ends(keys, device)}
    out = _check_against_the_definition(inputs, **ends)
    empty = torch.tensor([length == 0 for length in keys]).repeat_interleave(torch.tensor([2, 4, 3]))
    assert not bool(out[empty].any())
    assert not bool(inputs[0].grad[empty].any())
    assert bool(out[~empty].all())


def test_no_images() -> None:
    q, k = _leaves((0, 2, 16), (0, 2, 16))
    ends = {"cu_seqlens_q": _ends([]), "cu_seqlens_k": _ends([])}
    assert dk.ragged_attention(q, k, k, bias=torch.zeros(0), **ends).shape == (0, 2, 16)


def test_strided_keys_and_bias(device: torch.device, dtype: torch.dtype) -> None:
    packed = torch.randn(21, 2, 2, 32).to(device, dtype)
    k, v = packed.unbind(1)
    q = torch.randn(9, 2, 32).to(device, dtype)
    bias = torch.randn(2, 21, device=device).t()
    ends = {"cu_seqlens_q": _ends([4, 5], device), "cu_seqlens_k": _ends([20, 1], device)}
    contiguous = dk.ragged_attention(q, k.contiguous(), v.contiguous(), bias=bias.contiguous(), **ends)
    assert torch.equal(dk.ragged_attention(q, k, v, bias=bias, **ends), contiguous)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_gradcheck(dense: bool, per_head: bool, device: torch.device) -> None:
    keys = (2, 4, 2, 3) if dense else (7, 2, 3)
    shapes = [(5, 2, 3), keys, keys, keys[:-1] if per_head else keys[:-2]]
    inputs = _leaves(*shapes, device=device, dtype=torch.float64)
    ends = {"cu_seqlens_q": _ends([2, 3], device), **({} if dense else {"cu_seqlens_k": _ends([6, 1], device)})}
    assert torch.autograd.gradcheck(lambda q, k, v, b: dk.ragged_attention(q, k, v, scale=0.8, bias=b, **ends), inputs)


def test_repeated_gradients_are_bit_equal(device: torch.device) -> None:
    inputs = _leaves((200, 3, 64), (300, 3, 64), (300, 3, 64), (300,), device=device)
    ends = {"cu_seqlens_q": _ends([50, 150], device), "cu_seqlens_k": _ends([290, 10], device)}
    runs = [
        torch.autograd.grad(dk.ragged_attention(*inputs[:3], bias=inputs[3], **ends).square().sum(), inputs)
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_bias_exact(low: torch.dtype, device: torch.device) -> None:
    q, k, v, bias = _leaves((9, 2, 16), (21, 2, 16), (21, 2, 16), (21,), device=device)
    ends = {"cu_seqlens_q": _ends([4, 5], device), "cu_seqlens_k": _ends([20, 1], device)}
    with torch.autocast(device.type, dtype=low):
        out = dk.ragged_attention(q, k, v, bias=bias, **ends)
    assert out.dtype == low
    assert torch.equal(out, dk.ragged_attention(q.to(low), k.to(low), v.to(low), bias=bias, **ends))
    out.float().sum().backward()
    assert bias.grad.dtype == torch.float32


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_lengths(data: st.DataObject) -> None:
    draw = data.draw
    lengths = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 90)), max_size=5))
    queries, keys = [a for a, _ in lengths], [b for _, b in lengths]
    heads, width = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    shape = draw(st.sampled_from([None, (sum(keys),), (sum(keys), heads)]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    inputs = _leaves((sum(queries), heads, width), *[(sum(keys), heads, width)] * 2, dtype=dtype)
    if shape is not None:
        bias = torch.randn(shape).masked_fill(torch.rand(shape) < draw(st.sampled_from([0, 0.3, 1])), -torch.inf)
        inputs.append(bias.to(dtype).requires_grad_())
    ends = {"cu_seqlens_q": _ends(queries), "cu_seqlens_k": _ends(keys)}
    _check_against_the_definition(inputs, slack=3, **ends)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head", "scale"), [(5, 0.3), (64, None), (20, -0.7), (61, 4.0)])
def test_a_bias_in_more_channels_is_the_bias(dtype: torch.dtype, head: int, scale: float | None) -> None:
    """What lets torch's varlen take a bias, to float32's precision in the bias although the channels are in halves."""
    scale = head**-0.5 if scale is None else scale
    q, k, v = (t.detach() for t in _leaves((9, 2, head), (21, 2, head), (21, 2, head), dtype=dtype))
    bias = torch.randn(21, 2) * 3
    bias[5] = -torch.inf
    wider = _varlen.with_bias(q, k, v, bias, scale)
    assert all(t.dtype == dtype and t.shape[-1] % 8 == 0 for t in wider)
    ends = {"cu_seqlens_q": _ends([4, 5]), "cu_seqlens_k": _ends([12, 9])}
    out = reference.ragged_attention(*(t.double() for t in wider), scale=scale, **ends)
    assert not bool(out[..., head:].any())
    expected = reference.ragged_attention(q.double(), k.double(), v.double(), scale=scale, bias=bias.double(), **ends)
    torch.testing.assert_close(out[..., :head], expected, rtol=0, atol=3e-6)


def _attend_by_definition(q: Tensor, k: Tensor, v: Tensor, *packed: Any, scale: float | None = None) -> Tensor:
    """In the place of torch's kernel, with its arguments and what it asks of them."""
    ends_q, ends_k, longest_q, longest_k = packed
    assert q.shape[-1] % 8 == 0
    assert longest_q >= int(ends_q.diff().max())
    assert longest_k >= int(ends_k.diff().max())
    return reference.ragged_attention(q, k, v, scale=scale, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k)


@pytest.mark.parametrize("takes_scale", [True, False])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_the_way_through_torchs_kernel(
    takes_scale: bool, biased: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_varlen, "fits", lambda *inputs: True)
    monkeypatch.setattr(_varlen, "_attend", _attend_by_definition)
    monkeypatch.setattr(_varlen, "_TAKES_SCALE", takes_scale)
    keys = (2, 12, 2, 16) if dense else (24, 2, 16)
    shapes = [(9, 2, 16), keys, keys, *([keys[:-2]] if biased else [])]
    ends = {"cu_seqlens_q": _ends([4, 5]), **({} if dense else {"cu_seqlens_k": _ends([20, 4])})}
    _check_against_the_definition(_leaves(*shapes), scale=0.37, **ends)


@pytest.mark.parametrize(
    ("head", "biased", "scale", "fits"),
    [
        (64, False, 1.0, True),
        (20, False, 1.0, False),
        (20, True, 1.0, True),
        (256, False, 1.0, True),
        (253, True, 1.0, True),
        (254, True, 1.0, False),
        (64, True, 0.0, False),
    ],
)
def test_what_torchs_kernel_is_asked_for(
    head: int, biased: bool, scale: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(3, 1, head), device="cuda")
    bias = torch.zeros(3, 1) if biased else None
    assert _varlen.fits(q, torch.zeros(3, 1, head), bias, scale) is fits
