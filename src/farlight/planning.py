"""`fl.plan`: the plan that a backend executes, as a value of the caller's own."""

from __future__ import annotations

import torch

from farlight.errors import ArgumentError
from farlight.kernels import registry
from farlight.kernels.backend import Request
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan import Plan, plan_for
from farlight.plan.content import ContentPlan

__all__ = ["plan"]


def plan(
    pattern: Pattern,
    n_q: int,
    n_k: int | None = None,
    *,
    batch: int = 1,
    heads: int = 1,
    q_offset: int | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Plan:
    """The plan of `pattern` for n_q queries and n_k keys (default n_q): which tiles visit which keys, and how.

    Query row r stands at position `q_offset + r`, by default `n_k - n_q + r`. Cost and memory grow with the tiles visited,
    never with n_q · n_k. The plan is a value: `fl.attention(q, k, v, plan)` executes these tables and no others, without
    looking anything up; writing into them changes nobody else's plan.

    Args:
        device: where attention will run; the tables are in memory of the host and are uploaded by the first call.
        backend: the backend that will execute the plan. "auto": the tiles are those of the device's best; a call that takes
            another backend, because one is named or dtypes require it, plans the pattern for that one.

    Raises PatternError when the pattern does not fit the sizes, ArgumentError for a backend that executes no plans.

    >>> import farlight as fl
    >>> plan = fl.plan(fl.presets.longformer(512), 16_384)
    >>> plan.pairs == fl.presets.longformer(512).count(16_384), plan.waste < 1.1
    (True, True)
    """
    registry.check_name(backend)
    sizes = Sizes.of(n_q, n_k, batch=batch, heads=heads, q_offset=q_offset)
    request = Request(pattern, sizes, heads, 64, 64, torch.float32, torch.device(device))
    if backend != "auto" and backend not in registry.plan_backends():
        choices = ", ".join(map(repr, registry.plan_backends()))
        raise ArgumentError(
            f"backend = {backend!r} attends under a mask and executes no plans; use 'auto' or one of {choices}."
        )
    executor = registry.plan_backend(request, backend)
    built = registry.plan_of(executor, request) if executor.name == "cpu" else None
    if not isinstance(built, ContentPlan):
        built = plan_for(pattern, sizes, executor.tile_shape)
    return built.copied("" if backend == "auto" else executor.name)
