"""What torch asks of an operator: schema, fake kernel, autograd registration, compilation, export."""

import pytest
import torch
from cases import Case, assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import dge_kernels as dk

OPERATORS = [
    "plan_queries",
    "count_queries",
    "write_patches",
    "pool_queries",
    "pool_queries_backward",
    "unpool_queries",
    "unpool_queries_backward",
    "ragged_attention",
    "ragged_attention_backward",
    "route",
]


# Operators with the arguments that they may do without.
VARIANTS = [f"ragged_attention{which} {keys}" for which in ("", "_backward") for keys in ("packed", "biased")]


def _arguments(device: torch.device) -> dict[str, tuple]:
    case = Case((7, 9), channels=12)
    plan = case.plan(device)
    x = case.tokens(device).requires_grad_()
    rows = torch.randn(plan.total, 12, device=device, requires_grad=True)
    q = torch.randn(plan.total, 3, 4, device=device, requires_grad=True)
    k, v = torch.randn(2, 3, 10, 3, 4, device=device).requires_grad_().unbind(0)
    geometry = (*plan.grid, plan.num_prefix_tokens)
    out, logsumexp = torch.ops.dge_kernels.ragged_attention(q, k, v, plan.cu_seqlens, plan.max_seqlen, 0.5)
    ragged = (plan.cu_seqlens, plan.max_seqlen, 0.5)
    planning = (case.choice(device), [4, 2, 1], *geometry)
    sums, ends = torch.ops.dge_kernels.count_queries(*planning)
    detached = [t.detach() for t in (torch.randn_like(out), q, k, v, out, logsumexp)]
    bias = torch.randn(3, 10, 3, device=device)
    thirds = torch.arange(0, 31, 10, dtype=torch.int32, device=device)
    packed = [t if i not in (2, 3) else t.flatten(0, 1) for i, t in enumerate(detached)]
    keys = [t.clone().requires_grad_() for t in (q.detach(), *packed[2:4])]
    optional = {
        "ragged_attention packed": (*keys, *ragged, thirds, bias.flatten(0, 1).requires_grad_()),
        "ragged_attention_backward packed": (*packed, *ragged, thirds, bias.flatten(0, 1).detach()),
        "ragged_attention biased": (q, *detached[2:4], *ragged, None, bias.clone().requires_grad_()),
        "ragged_attention_backward biased": (*detached, *ragged, None, bias),
    }
    return {
        "plan_queries": planning,
        "count_queries": planning,
        "write_patches": (planning[0], sums, *planning[1:], int(ends[-1])),
        "pool_queries": (x, plan.patches, *geometry),
        "pool_queries_backward": (rows.detach(), plan.patches, 3, *geometry),
        "unpool_queries": (rows, plan.patches, x, *geometry),
        "unpool_queries_backward": (x.detach(), plan.patches, *geometry),
        "ragged_attention": (q, k.detach().requires_grad_(), v.detach().requires_grad_(), *ragged),
        "ragged_attention_backward": (*detached, *ragged),
        "route": (x.detach(), torch.randn(3, 12, device=device), torch.randn(3, device=device), 4, *geometry),
        **optional,
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("name", [*OPERATORS, *VARIANTS])
def test_opcheck(name: str, device: torch.device) -> None:
    torch.library.opcheck(getattr(torch.ops.dge_kernels, name.split()[0]).default, _arguments(device)[name])


def test_the_list_of_operators_is_complete() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dge_kernels::")
    }
    assert registered == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_cpu_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dge_kernels::{name}", "CPU")


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_cuda_kernel(name: str) -> None:
    info = dk.build_info()
    if info["cuda_version"] is None:
        pytest.skip("this copy was built without nvcc")
    if info["torch_cuda"] is None:
        pytest.skip("this torch is a CPU build")
    if info["torch_cuda"].split(".")[0] != info["cuda_version"].split(".")[0]:
        pytest.skip(f"built for CUDA {info['cuda_version']}, this torch for CUDA {info['torch_cuda']}")
    assert info["cuda_loaded"], info["cuda_reason"]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dge_kernels::{name}", "CUDA")


def _block(x: Tensor, weight: Tensor) -> Tensor:
    """A miniature of the block that the operators are made for."""
    choice = dk.route(x, weight[:3], grid=(8, 8), num_prefix_tokens=1)
    future = dk.plan_queries_async(choice, grid=(8, 8), num_prefix_tokens=1)
    keys = (x @ weight).unflatten(-1, (2, -1))
    plan = future.result()
    queries = dk.pool_queries(x, plan)
    q = (queries @ weight).unflatten(-1, (2, -1))
    return dk.unpool_queries(dk.ragged_attention(q, keys, keys, plan).flatten(1), plan, x)


def _block_inputs(batch: int, scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 65, 16, device=device) * scale
    return x.requires_grad_(), torch.randn(16, 16, device=device, requires_grad=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_once_whatever_the_number_of_queries(backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(_block, backend=counter, fullgraph=True, dynamic=True)
    for scale in (0.1, 1.0, 10.0, 3.0):
        x, weight = _block_inputs(3, scale, device)
        out, expected = compiled(x, weight), _block(x, weight)
        assert_close(out, expected)
        grads = torch.autograd.grad(out.square().sum(), (x, weight))
        for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), (x, weight)), strict=True):
            assert_close(grad, wanted)  # entries that cancel are held to the size of the largest
    assert counter.frame_count == 1


def _packed_images(x: Tensor, weight: Tensor, ends: Tensor, sizes: Tensor) -> Tensor:
    heads = (x @ weight).unflatten(-1, (2, -1))
    arguments = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "bias": sizes.log()}
    return x + dk.ragged_attention(heads, heads, heads, **arguments).flatten(1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_packed_keys_compile_once_whatever_their_number(backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(_packed_images, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([4, 9, 30], [20, 0, 6], [50, 60, 70]):
        x = torch.randn(sum(lengths), 16, device=device, requires_grad=True)
        sizes = torch.rand(sum(lengths), device=device).add(1).requires_grad_()
        leaves = (x, torch.randn(16, 16, device=device, requires_grad=True))
        ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        out, expected = compiled(*leaves, ends, sizes), _packed_images(*leaves, ends, sizes)
        assert_close(out, expected)
        grads = torch.autograd.grad(out.square().sum(), (*leaves, sizes))
        for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), (*leaves, sizes)), strict=True):
            assert_close(grad, wanted)
    assert counter.frame_count == 1


def test_compiles_under_autocast(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True, dynamic=True)
    x, weight = (t.detach() for t in _block_inputs(2, 1.0, device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, expected = compiled(x, weight), _block(x, weight)
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_exports_with_a_dynamic_batch() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return _block(x, self.weight)

    module = Block().eval()
    with torch.no_grad():
        example = torch.randn(2, 65, 16)
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        for batch in (2, 5):
            x = torch.randn(batch, 65, 16)
            torch.testing.assert_close(program.module()(x), module(x))
