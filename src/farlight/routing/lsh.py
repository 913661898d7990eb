"""Routing by hashing: near vectors fall into one bucket under a random rotation (Reformer)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern
from farlight.patterns.hashing import hash_words
from farlight.patterns.multi_label import meets
from farlight.patterns.positional import causal as past
from farlight.patterns.tables import clusters
from farlight.routing.base import Choice, Router, stretches

__all__ = ["LSH", "rotations"]


class LSH(Router):
    """Angular locality-sensitive hashing: i sees j when some round puts q_i and k_j into one bucket.

        h_r(x) = argmax [x R_r ; -x R_r],   R_r: (D, buckets / 2) standard normal numbers
        i sees j when h_r(q_i) = h_r(k_j) for some r

    The rounds are a union of sets: a pair that meets in several rounds is one pair. `R_r` is a pure function of
    (seed, head, round), so that any rank, device or later call hashes alike; there is nothing to learn or to store.
    `causal=True` drops keys after the query. `shared=True` hashes the key at a query's position in place of the query.

    Kitaev, Kaiser & Levskaya 2020, "Reformer", arXiv:2001.04451 (equation 6; its chunks of sorted buckets, which cut
    large buckets and join small ones, are left out: buckets run whole).

    >>> import torch
    >>> from farlight.routing import LSH
    >>> x = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]]]])
    >>> LSH(2)(x, x).dense(3).int()[0, 0].tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """

    def __init__(self, buckets: int, rounds: int = 1, *, seed: int = 0, causal: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.buckets, self.rounds = whole("LSH: buckets", buckets, 2), whole("LSH: rounds", rounds, 1)
        self.seed = whole("LSH: seed", seed, 0, 2**63 - 1)
        if self.buckets % 2:
            raise ArgumentError(f"LSH: buckets = {buckets} is odd; a rotated axis gives two buckets, so pass an even number.")
        self.causal, self.shared = bool(causal), bool(shared)

    def extra_repr(self) -> str:
        flags = "".join(f", {name}=True" for name in ("causal", "shared") if getattr(self, name))
        return f"{self.buckets}, {self.rounds}, seed={self.seed}{flags}"

    def choose(self, given: Choice) -> Pattern:
        if self.shared and given.n_q > given.n_k:
            raise ArgumentError(
                f"LSH(shared=True): {given.n_q} queries, but {given.n_k} keys: a query takes the bucket of the key at its "
                "position; use shared=False where queries come from another text."
            )
        turn = rotations(self.seed, self.rounds, given.heads, given.q.shape[3], self.buckets // 2).to(given.q)
        key = hashed(given.k, turn, given.key_part())
        query = key[..., given.offset :] if self.shared else hashed(given.q, turn, given.query_part())
        pattern: Pattern = meets(query.movedim(0, -1), key.movedim(0, -1)) if self.rounds > 1 else clusters(query[0], key[0])
        return pattern & past() if self.causal else pattern


def rotations(seed: int, rounds: int, heads: int, dim: int, half: int) -> Tensor:
    """`(rounds, heads, dim, half)` float64 standard normal numbers, each a function of (seed, round, head, row, column)."""
    sizes = (rounds, heads, dim, half)
    at = [torch.arange(n, device="cpu").view([-1 if a == b else 1 for b in range(4)]) for a, n in enumerate(sizes)]
    # Box and Muller's transformation of two uniform numbers.
    first, second = ((hash_words(seed & 0xFFFFFFFF, seed >> 32, *at, which).double() + 0.5) / 2**32 for which in (0, 1))
    return (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()


def hashed(x: Tensor, turn: Tensor, real: Tensor | None) -> Tensor:
    """`(rounds, B, H, N)` buckets; -1 where the token is not real."""
    rounds, heads = turn.shape[:2]
    buckets = torch.empty(rounds, x.shape[0], heads, x.shape[2], dtype=torch.int64, device=x.device)
    group = heads // x.shape[1]
    # The rotations of a key head's query heads side by side: (rounds, 1, H_kv, D, group · half).
    table = turn.unflatten(1, (x.shape[1], group)).transpose(2, 3).flatten(3, 4)[:, None]
    for part in stretches(x.shape[2], rounds * x.shape[0] * heads * turn.shape[3] * 2):
        turned = (x[:, :, part] @ table).unflatten(4, (group, -1)).transpose(3, 4).flatten(2, 3)
        buckets[:, :, :, part] = torch.cat((turned, -turned), -1).argmax(-1)
    return buckets if real is None else buckets.masked_fill_(~real, -1)
