"""`LSH`: routing by angular locality-sensitive hashing; a query attends to the keys of its own bucket (Reformer).

One round of buckets becomes `clusters(labels)`; several rounds become `meets(labels)`, a union without duplicate pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from farlight.caching import SizedCache
from farlight.errors import ArgumentError
from farlight.kernels.cpu.choose import can_choose
from farlight.kernels.cpu.labels import nearest_labels
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.hashing import hash_words
from farlight.patterns.multi_label import meets
from farlight.patterns.positional import causal as past
from farlight.patterns.tables import clusters
from farlight.routing.base import Router, RouterInput, row_chunks

__all__ = ["LSH", "rotations"]

_drawn: SizedCache[Tensor] = SizedCache(16 * 2**20)


class LSH(Router):
    """Angular locality-sensitive hashing: query i sees key j when they share a bucket in some round r.

        h_r(x) = argmax [x R_r ; -x R_r],   R_r: (D, buckets / 2), standard normal entries
        i sees j when h_r(q_i) = h_r(k_j) for some r

    The result is a set: a pair that shares buckets in several rounds is one pair. `R_r` is a pure function of (seed, head,
    round), so every rank, device and call hashes alike; there are no parameters and no buffers. `causal=True` removes keys
    after the query. `shared=True` gives query i the bucket of the key at its own position.

    Raises ArgumentError for arguments out of range, an odd number of buckets, and `shared` with more queries than keys.

    Kitaev, Kaiser & Levskaya 2020, "Reformer", arXiv:2001.04451, equation 6. Reformer's chunks, which split
    large buckets and merge small ones, are not applied.

    >>> import torch
    >>> from farlight.routing import LSH
    >>> x = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]]]])
    >>> LSH(2)(x, x).dense(3).int()[0, 0].tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """

    reads_16_bits = True

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

    def choose(self, inputs: RouterInput) -> Pattern:
        if self.shared and inputs.n_q > inputs.n_k:
            raise ArgumentError(
                f"LSH(shared=True): {inputs.n_q} queries, but {inputs.n_k} keys: a query takes the bucket of the key at its "
                "position; use shared=False where queries come from another text."
            )
        rotation = rotations(self.seed, self.rounds, inputs.heads, inputs.q.shape[3], self.buckets // 2)
        rotation = rotation.to(inputs.q.device, torch.promote_types(inputs.q.dtype, torch.float32))
        key = hash_buckets(inputs.k, rotation, inputs.key_mask_by_head())
        if self.shared:
            query = key[..., inputs.offset :]
        else:
            query = hash_buckets(inputs.q, rotation, inputs.query_mask_by_head())
        return self.pattern_of_buckets(query, key)

    def products(self, sizes: Sizes) -> int:
        tokens = sizes.n_k + (0 if self.shared else sizes.n_q)
        return sizes.batch * sizes.heads * tokens * self.rounds * self.buckets // 2

    def pattern_of_buckets(self, query: Tensor, key: Tensor) -> Pattern:
        """The pattern of buckets `(rounds, B, H, n_q)` and `(rounds, B, H, n_k)`."""
        pattern: Pattern = meets(query.movedim(0, -1), key.movedim(0, -1)) if self.rounds > 1 else clusters(query[0], key[0])
        return pattern & past() if self.causal else pattern


def rotations(seed: int, rounds: int, heads: int, dim: int, half: int) -> Tensor:
    """`(rounds, heads, dim, half)` float64 standard normal numbers, each a function of (seed, round, head, row, column).

    Kept from call to call, since drawing them takes longer than hashing a short text: not to be written to.
    """
    sizes = seed, rounds, heads, dim, half
    # A mode that makes other tensors, such as FakeTensorMode, takes only its own.
    if type(torch.empty(0, device="cpu")) is not Tensor:
        return _draw(*sizes)
    with torch.inference_mode(False):
        return _drawn.get(sizes, lambda: _draw(*sizes))


def _draw(seed: int, rounds: int, heads: int, dim: int, half: int) -> Tensor:
    shape = (rounds, heads, dim, half)
    index = [torch.arange(n, device="cpu").view([-1 if a == b else 1 for b in range(4)]) for a, n in enumerate(shape)]
    # Box-Muller transform of two uniform numbers.
    u1, u2 = ((hash_words(seed & 0xFFFFFFFF, seed >> 32, *index, stream).double() + 0.5) / 2**32 for stream in (0, 1))
    return (-2 * u1.log()).sqrt() * (2 * math.pi * u2).cos()


def hash_buckets(x: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
    """`(rounds, B, H, N)` int64: the bucket of each token of x `(B, H_kv, N, D)` in each round; -1 for padding.

    rotation `(rounds, H, D, buckets / 2)`; mask: bool, broadcastable to `(B, H, N)`, or None.
    """
    if can_choose(x):
        columns = torch.cat((rotation, -rotation), -1).transpose(-1, -2)
        real = None if mask is None else mask[:, 0]
        return torch.stack([nearest_labels(x, each, real) for each in columns])
    x = x.to(rotation.dtype)
    rounds, heads = rotation.shape[:2]
    buckets = torch.empty(rounds, x.shape[0], heads, x.shape[2], dtype=torch.int64, device=x.device)
    group = heads // x.shape[1]
    # One matrix per key head, the rotations of its query heads side by side: (rounds, 1, H_kv, D, group · half).
    matrix = rotation.unflatten(1, (x.shape[1], group)).transpose(2, 3).flatten(3, 4)[:, None]
    for rows in row_chunks(x.shape[2], rounds * x.shape[0] * heads * rotation.shape[3] * 2):
        rotated = (x[:, :, rows] @ matrix).unflatten(4, (group, -1)).transpose(3, 4).flatten(2, 3)
        buckets[:, :, :, rows] = torch.cat((rotated, -rotated), -1).argmax(-1)
    return buckets if mask is None else buckets.masked_fill_(~mask, -1)
