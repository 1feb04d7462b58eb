from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dge_models.graph_breaks import outside_graphs


@outside_graphs("it reads values")
def _doubled_if_large(x: torch.Tensor) -> torch.Tensor:
    return 2 * x if float(x.sum()) > 1 else x


def _around(x: torch.Tensor) -> torch.Tensor:
    return _doubled_if_large(x + 1) - 1


def test_compiled_code_breaks_off_and_goes_on() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(_around, backend=counter)
    for x in (torch.zeros(2), torch.ones(2)):
        assert torch.equal(compiled(x), _around(x))
    assert counter.frame_count == 2  # before and after


def test_the_error_of_one_graph_says_why() -> None:
    torch.compiler.reset()
    with pytest.raises(Exception, match="it reads values"):
        torch.compile(_around, backend="eager", fullgraph=True)(torch.ones(2))
