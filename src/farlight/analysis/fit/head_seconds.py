"""Seconds that a candidate takes in one head of a layer, measured on the layer's own call."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from farlight.analysis.candidates_by_layer import pattern_for
from farlight.attention import attention
from farlight.hf.setting import Observation
from farlight.patterns.positional import full
from farlight.routing.base import ConstantRouter, Router
from farlight.routing.head_routers import PerHeadRouter

__all__ = ["HeadSeconds", "attention_seconds", "head_seconds"]

# Calls that are timed, of which the fastest counts: other work on the machine only adds to a call.
_CALLS = 3


class HeadSeconds(NamedTuple):
    """Seconds of a call divided by its heads: where each head chooses for itself, as in a fit; where one choice serves all."""

    apart: float
    together: float


def head_seconds(call: Observation, choice: Router) -> HeadSeconds:
    """Seconds of attention under `choice`, choosing and planning included. `full()`: the model's own attention.

    The plan of a pattern is made before the clock runs, since the plan cache keeps it; that of a choice is made in every call.
    """
    heads, together = call.q.shape[1], attention_seconds(call, choice)
    if isinstance(choice, ConstantRouter):
        return HeadSeconds(together / heads, together / heads)
    return HeadSeconds(attention_seconds(call, PerHeadRouter([choice] * heads)) / heads, together / heads)


def attention_seconds(call: Observation, chooser: Router) -> float:
    """Seconds of attention in one call under what is chosen, choosing and planning included: the fastest of some calls."""
    q, k, v = (x.detach() for x in (call.q, call.k, call.v))

    def attend() -> None:
        pattern = pattern_for(chooser, q, k, call.key_real)
        # Not `==`, which would digest a choice's lists inside of the timed call.
        allowed = call.own if pattern is None or isinstance(pattern, full) else pattern & call.own
        attention(q, k, v, allowed, scale=call.scale, q_offset=call.q_offset, **call.terms)

    seconds = []
    with torch.no_grad():
        attend()
        for _ in range(_CALLS):
            start = time.perf_counter()
            attend()
            seconds.append(time.perf_counter() - start)
    return min(seconds)
