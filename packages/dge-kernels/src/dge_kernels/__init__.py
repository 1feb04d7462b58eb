"""Ragged-query operators for vision transformers: plan, pool, attend, unpool.

Spend one, four or sixteen queries on a region of an image, as its content asks; keys and values stay dense, or are
ragged too, for images of several sizes.
See :mod:`dge_kernels.functional` for the operators and :mod:`dge_kernels.reference` for their definition.
"""

from dge_kernels import _library, reference
from dge_kernels._build_info import build_info
from dge_kernels._future import QueryPlanFuture
from dge_kernels.functional import (
    plan_queries,
    plan_queries_async,
    pool_queries,
    ragged_attention,
    route,
    unpool_queries,
)
from dge_kernels.plan import QueryPlan

if _library.CPU.loaded:
    from dge_kernels import _autograd, _fake, _flops, _vmap

    _fake.register()
    _autograd.register()
    _flops.register()
    _vmap.register()

__all__ = [
    "QueryPlan",
    "QueryPlanFuture",
    "build_info",
    "plan_queries",
    "plan_queries_async",
    "pool_queries",
    "ragged_attention",
    "reference",
    "route",
    "unpool_queries",
]
__version__: str = _library.BUILD.version if _library.BUILD else "0+source"
