"""Routing by clusters: tokens meet in the room of their nearest centroid (Routing Transformer)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.inputs import without_autocast
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern
from farlight.patterns.membership import between, rooms
from farlight.patterns.positional import causal as past
from farlight.patterns.tables import clusters
from farlight.routing.base import Choice, Router, read
from farlight.routing.centroids import by_centroid, first_centroids, members_sum, moved, nearest, squared_distance, unit

__all__ = ["KMeans"]

_FIRST_STEPS = 5


class KMeans(Router):
    """Spherical k-means for each head: a query sees the keys that share its centroid.

        c(x) = argmax_c μ_c · x / ‖x‖;        plain: i sees j when c(q_i) = c(k_j)

    With `per_cluster = w` rooms are bounded:

    * not causal (balanced, as published): room c holds the w queries and the w keys with the largest μ_c · x / ‖x‖. A token
      may be in several rooms or in none; i sees j when some room holds both.
    * causal: i sees the w most recent keys j <= i with c(k_j) = c(q_i). Which keys are best cannot be known before the text
      has ended, so the most recent stand in; a choice made at i is never changed by what follows.

    `causal=True` also drops keys after the query. `shared=True` takes a query's room from the key at its own position (as
    in the causal Routing Transformer, whose queries are its keys).

    In training mode each call, after its choice has been made, moves the centroids towards the unit vectors that chose
    them, by exponential moving average: `μ_c ← (decay · μ_c + (1 - decay) · mean)/‖…‖`, over real queries and keys of the
    whole batch and, where torch.distributed is initialised, of all ranks. Centroids stay in float32 where a model is cast
    to 16 bits. No gradient reaches a centroid; `commitment` gives a loss that draws tokens to centroids. The first such
    call places the centroids by `fit`. So a choice depends on earlier calls and on the tokens of its own room, never on
    later tokens of its own text.

    Args:
        heads: query heads (each has its own centroids); head_dim; clusters: rooms in each head.
        per_cluster: None, or how many tokens a room holds.
        decay: of the moving average; 1.0 leaves the centroids as they are.
        seed: for the centroids before there are data, and for those that `fit` starts from.

    Roy, Saffar, Vaswani & Grangier 2021, "Efficient Content-Based Sparse Attention with Routing Transformers",
    arXiv:2003.05997.

    >>> import torch
    >>> from farlight.routing import KMeans
    >>> router = KMeans(1, 2, 2).eval()
    >>> router.centroids.copy_(torch.eye(2)[None]).shape
    torch.Size([1, 2, 2])
    >>> x = torch.tensor([[[[3.0, 1.0], [0.1, 0.2], [1.0, 0.0]]]])
    >>> router(x, x).dense(3).int()[0, 0].tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """

    centroids: Tensor
    updates: Tensor

    def __init__(
        self,
        heads: int,
        head_dim: int,
        clusters: int,
        *,
        per_cluster: int | None = None,
        causal: bool = False,
        decay: float = 0.999,
        shared: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        heads, head_dim = whole("KMeans: heads", heads, 1), whole("KMeans: head_dim", head_dim, 1)
        self.clusters = whole("KMeans: clusters", clusters, 1)
        self.per_cluster = None if per_cluster is None else whole("KMeans: per_cluster", per_cluster, 1)
        if not 0.0 <= decay <= 1.0:
            raise ArgumentError(f"KMeans: decay = {decay}: the share of a centroid that stays lies between 0 and 1.")
        self.causal, self.decay, self.shared = bool(causal), float(decay), bool(shared)
        self.seed = whole("KMeans: seed", seed, 0, 2**63 - 1)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(heads, self.clusters, head_dim, generator=generator, dtype=torch.float32, device="cpu")
        self.register_buffer("centroids", unit(drawn).to(torch.get_default_device()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    # ---- the dtype of centroids --------------------------------------------------------------------------------------
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KMeans:
        """Casts of a model to 16 bits leave the centroids in float32: a moving average that adds 1 - decay of a mean, and sums
        and numbers of members, would be lost in 8 or 11 bits."""
        before = self.centroids
        super()._apply(fn, recurse)
        if self.centroids.itemsize < torch.float32.itemsize:
            self.centroids = before.to(device=self.centroids.device, dtype=torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}centroids"
        if name in state_dict:
            state_dict[name] = _at_least_float32(state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        heads, count, dim = self.centroids.shape
        more = "" if self.per_cluster is None else f", per_cluster={self.per_cluster}"
        flags = "".join(f", {name}=True" for name in ("causal", "shared") if getattr(self, name))
        return f"{heads}, {dim}, {count}{more}{flags}, decay={self.decay:g}"

    def choose(self, given: Choice) -> Pattern:
        self._check(given)
        pattern = self._pattern(given)
        if self.training and self.decay < 1.0:
            self._learn(given)
        return pattern

    def labels(
        self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, query_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The nearest centroid of each query `(B, H, n_q)` and key `(B, H, n_k)`; -1 for padding."""
        with torch.no_grad():
            given = read(q, k, key_mask, query_mask)
            self._check(given)
            with without_autocast(given.q):
                return self._labels(given)

    def commitment(self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, query_mask: Tensor | None = None) -> Tensor:
        """The mean squared distance of unit queries and keys to their centroids, for training: a gradient for q and k.

        mean over real tokens x and heads of ‖x / ‖x‖ - μ_c(x)‖²
        """
        query, key = self.labels(q, k, key_mask=key_mask, query_mask=query_mask)
        parts = [squared_distance(k, self.centroids, key)]
        if not self.shared:
            parts.append(squared_distance(q, self.centroids, query))
        total = torch.stack([t for t, _ in parts]).sum()
        return total / sum(n for _, n in parts).clamp(min=1)  # type: ignore[union-attr]

    @torch.no_grad()
    def fit(
        self, q: Tensor, k: Tensor, *, steps: int = 10, key_mask: Tensor | None = None, query_mask: Tensor | None = None
    ) -> KMeans:
        """Place the centroids by spherical k-means on these tokens: distinct random tokens, then `steps` of Lloyd's method.

        A centroid that nobody chooses stays where it is. Where torch.distributed is initialised all ranks start from the
        tokens of rank 0 and sum their members.
        """
        given = read(q, k, key_mask, query_mask)
        self._check(given)
        with without_autocast(given.q):
            self.place(given, whole("KMeans.fit: steps", steps, 0))
        return self

    # ---- the choice --------------------------------------------------------------------------------------------------
    def _check(self, given: Choice) -> None:
        self.centroids = _at_least_float32(self.centroids)  # a loader may have replaced the buffer
        heads, _, dim = self.centroids.shape
        if (given.heads, given.q.shape[3]) != (heads, dim):
            raise ArgumentError(
                f"KMeans was made for {heads} heads of head_dim {dim}, but q has {given.heads} of {given.q.shape[3]}; "
                "make one with the numbers of the model."
            )
        if self.shared and given.n_q > given.n_k:
            raise ArgumentError(
                f"KMeans(shared=True): {given.n_q} queries, but {given.n_k} keys: a query takes the room of the key at its "
                "position; use shared=False where queries come from another text."
            )

    def _own(self, of_keys: Tensor, given: Choice, dim: int) -> Tensor:
        """What belongs to the keys at the queries' positions."""
        return of_keys.narrow(dim, given.offset, given.n_q)

    def _labels(self, given: Choice) -> tuple[Tensor, Tensor]:
        key = nearest(given.k, self.centroids, given.key_part())
        if self.shared:
            return self._own(key, given, 2), key
        return nearest(given.q, self.centroids, given.query_part()), key

    def _pattern(self, given: Choice) -> Pattern:
        if self.per_cluster is not None and not self.causal:
            return self._balanced(given, self.per_cluster)
        query, key = self._labels(given)
        pattern: Pattern = clusters(query, key)
        if not self.causal:
            return pattern
        pattern = pattern & past()
        if self.per_cluster is not None:
            pattern = pattern & between(most_recent(query, key, self.per_cluster))
        return pattern

    def _balanced(self, given: Choice, per_cluster: int) -> Pattern:
        key = strongest(given.k, self.centroids, given.key_part(), per_cluster)
        if self.shared:
            return rooms(self._own(key, given, 2), key)
        return rooms(strongest(given.q, self.centroids, given.query_part(), per_cluster), key)

    # ---- learning ----------------------------------------------------------------------------------------------------
    def _tokens(self, given: Choice) -> list[tuple[Tensor, Tensor | None]]:
        """The tokens that centroids learn from, and which are real."""
        keys = (given.k, given.key_part())
        return [keys] if self.shared else [(given.q, given.query_part()), keys]

    def _learn(self, given: Choice) -> None:
        if int(self.updates) == 0:
            self.place(given, _FIRST_STEPS)
        else:
            self.centroids.copy_(moved(self.centroids, members_sum(self._tokens(given), self.centroids), self.decay))
        self.updates += 1

    def place(self, given: Choice, steps: int) -> None:
        tokens = self._tokens(given)
        self.centroids.copy_(first_centroids(tokens, self.centroids, self.seed))
        for _ in range(steps):
            self.centroids.copy_(moved(self.centroids, members_sum(tokens, self.centroids), 0.0))
        self.updates.clamp_(min=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def strongest(x: Tensor, centroids: Tensor, real: Tensor | None, count: int) -> Tensor:
    """`(B, H, N, C)` bool: the token is among the `count` real ones of its batch item nearest to the centroid."""
    scores = by_centroid(unit(x), centroids)
    if real is not None:
        scores = scores.masked_fill(~real.unsqueeze(-1), float("-inf"))
    best = scores.topk(min(count, scores.shape[2]), dim=2)
    members = torch.zeros(scores.shape, dtype=torch.bool, device=x.device)
    return members.scatter_(2, best.indices, best.values > float("-inf"))


def most_recent(query: Tensor, key: Tensor, count: int) -> Tensor:
    """`(B, H, n_q)`: where the `count` most recent keys with the query's label begin, among those up to its position."""
    n_q, n_k = query.shape[2], key.shape[2]
    if not n_k:
        return torch.zeros_like(query)
    place = torch.arange(n_k, device=key.device)
    code = (key * n_k + place).sort(-1).values
    here = torch.arange(n_k - n_q, n_k, device=key.device)
    label = query * n_k
    reached = torch.searchsorted(code, (label + here).contiguous(), right=True)
    first = torch.searchsorted(code, label.contiguous())
    begin = torch.maximum(first, reached - count)
    return torch.where(begin < reached, code.gather(-1, begin.clamp(max=n_k - 1)) - label, 0)
