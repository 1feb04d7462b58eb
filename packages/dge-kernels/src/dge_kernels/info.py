"""What is installed, what it was built for, and what works on this machine: ``python -m dge_kernels.info``."""

from __future__ import annotations

import argparse
import json

import torch

from dge_kernels import functional, reference
from dge_kernels._build_info import build_info

__all__ = ["main"]


def _self_test(device: str) -> str:
    """Run every operator once on `device` against the reference; says "ok" or what went wrong."""
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(0, 3, (2, 2, 3), generator=generator)
    x = torch.randn(2, 1 + 5 * 9, 32, generator=generator)
    arguments = {"grid": (5, 9), "num_prefix_tokens": 1}
    expected_plan = reference.plan_queries(choice, (4, 2, 1), grid=(5, 9), num_prefix_tokens=1)
    expected = reference.pool_queries(x, expected_plan)
    heads = x.view(2, -1, 2, 16)
    expected = reference.ragged_attention(expected.view(-1, 2, 16), heads, heads, expected_plan).flatten(1)
    expected = reference.unpool_queries(expected, expected_plan, x)

    x, heads = x.to(device), heads.to(device)
    functional.route(x, x[0, :3], **arguments)  # type: ignore[arg-type]
    plan = functional.plan_queries(choice.to(device), **arguments)  # type: ignore[arg-type]
    queries = functional.pool_queries(x, plan).view(-1, 2, 16)
    result = functional.unpool_queries(functional.ragged_attention(queries, heads, heads, plan).flatten(1), plan, x)
    error = float((result.cpu() - expected).abs().max())
    return "ok" if error < 1e-5 else f"wrong: largest error {error:.1e}"


def _report(device: str, loaded: bool, reason: str | None, present: bool) -> str:
    if not loaded:
        return f"off: {reason}"
    if not present:
        return "loaded, but this machine has no CUDA device"
    try:
        return _self_test(device)
    except RuntimeError as error:
        return f"fails: {error}"


def main(arguments: list[str] | None = None) -> int:
    """Print the facts and a self-test per device; returns 1 where the CPU kernels do not work, else 0."""
    parser = argparse.ArgumentParser(prog="python -m dge_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    wants_json = parser.parse_args(arguments).json
    info = build_info()
    tests = {
        "cpu_self_test": _report("cpu", info["cpu_loaded"], info["cpu_reason"], True),
        "cuda_self_test": _report("cuda", info["cuda_loaded"], info["cuda_reason"], bool(info["cuda_devices"])),
    }
    facts = {**info, **tests}
    if wants_json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            shown = ", ".join(value) or "none" if isinstance(value, list) else value
            print(f"{name.replace('_', ' '):22} {'-' if shown is None else shown}")
    return 0 if tests["cpu_self_test"] == "ok" else 1


if __name__ == "__main__":
    raise SystemExit(main())
