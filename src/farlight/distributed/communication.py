"""`communication`: pairs and bytes per rank of one attention, predicted for any number of ranks without running it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from farlight.distributed.exchange import Problem, exchange_of
from farlight.distributed.layout import Layout
from farlight.distributed.traffic import TravelWidths, backward_traffic, forward_traffic
from farlight.errors import ArgumentError, show
from farlight.patterns.expression import Pattern, Sizes

__all__ = ["Communication", "communication"]

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Communication:
    """Predicted work and traffic of one attention, one entry per rank, int64 `(world,)`.

    pairs: (query, key) pairs that the rank computes, over batch and heads. sent, received: bytes of the forward pass;
    sent_backward, received_backward: those of the backward pass. Bytes are those of the tensors; what a rank keeps is not
    counted. minimum: total weight of the minimum vertex covers = forward bytes of all links served one by one, without
    broadcasts.
    """

    pairs: Array
    sent: Array
    received: Array
    sent_backward: Array
    received_backward: Array
    minimum: int

    def __str__(self) -> str:
        head = "rank            pairs   sent, MB  received, MB   backward: sent, MB  received, MB"
        columns = (self.pairs, self.sent, self.received, self.sent_backward, self.received_backward)
        rows = [
            f"{rank:4d} {pairs:16,d} {sent / 1e6:10.3f} {received / 1e6:13.3f} {back / 1e6:20.3f} {got / 1e6:13.3f}"
            for rank, (pairs, sent, received, back, got) in enumerate(zip(*columns, strict=True))
        ]
        return "\n".join([head, *rows])


def communication(
    layout: Layout,
    pattern: Pattern,
    *,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    move: str = "cheapest",
) -> Communication:
    """Pairs and bytes per rank of `fl.distributed.attention` under `pattern`, forward and backward.

    A pure function of its arguments: no process group, no tensors. These are the sizes that the attention hands to its
    collectives. Time and memory grow with the tokens and with what travels, not with n² or the square of a window.

    Raises PatternError where the pattern does not fit the layout's tokens.

    >>> import farlight as fl
    >>> plan = Layout.even(4096, 4).communication(fl.window(64), heads=2, head_dim=32)
    >>> plan.received.tolist()  # 64 keys and values from each neighbour: 64 · 2 heads · (32 + 32) numbers · 2 bytes
    [16384, 32768, 32768, 16384]
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ArgumentError(f"communication: {heads} heads are not a multiple of {kv_heads} key heads.")
    widths = TravelWidths(
        head_dim, head_dim if value_dim is None else value_dim, dtype.itemsize, 8 if dtype == torch.float64 else 4
    )
    sizes = Sizes.of(layout.n, batch=batch, heads=heads)
    exchange = exchange_of(problem_of(pattern, sizes, kv_heads, layout, layout, widths, move))
    forward, backward = forward_traffic(exchange, widths), backward_traffic(exchange, widths)
    pairs = np.zeros(layout.world, dtype=np.int64)
    for moved in exchange.classes:
        pairs += len(moved.heads.rows) * moved.pairs
    minimum = sum(len(moved.heads.rows) * moved.weight for moved in exchange.classes)
    return Communication(pairs, forward.sent(), forward.received(), backward.sent(), backward.received(), minimum)


def problem_of(
    pattern: Pattern, sizes: Sizes, kv_heads: int, queries: Layout, keys: Layout, widths: TravelWidths, move: str
) -> Problem:
    """The problem with the forward bytes of a key and of a query row as weights. Raises ArgumentError for an unknown `move`."""
    if move not in ("cheapest", "keys"):
        raise ArgumentError(f"move = {show(move)}: use 'cheapest' or 'keys'.")
    key_bytes = (widths.key + widths.value) * widths.element
    row_bytes = (widths.key + widths.value) * widths.element + widths.total
    return Problem(pattern, sizes, kv_heads, queries, keys, key_bytes, row_bytes, move == "keys")
