"""`KMeans`: routing by spherical k-means; a query attends to the keys of its own cluster (Routing Transformer).

The tensor arithmetic is in `centroids`. Plain clusters become `clusters(labels)`, which planning turns into dense blocks;
balanced ones, which may overlap, become `rooms(membership)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.inputs import without_autocast
from farlight.kernels.cpu.labels import can_label
from farlight.kernels.cpu.labels import recent_starts as native_starts
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.membership import between, rooms
from farlight.patterns.positional import causal as past
from farlight.patterns.tables import clusters
from farlight.routing.base import Router, RouterInput, check_inputs
from farlight.routing.centroids import (
    MaskedTokens,
    centroid_scores,
    init_centroids,
    member_sums,
    nearest_centroid,
    normalize,
    squared_distance,
    update_centroids,
)

__all__ = ["KMeans"]

# Steps of Lloyd's algorithm when a first training call initialises the centroids.
_INIT_STEPS = 5


class KMeans(Router):
    """Spherical k-means for each query head: query i sees key j when both have the same nearest centroid.

        c(x) = argmax_c μ_c · x / ‖x‖;        plain: i sees j when c(q_i) = c(k_j)

    `per_cluster = w` bounds the clusters:

    * not causal (balanced, as published): cluster c holds the w queries and the w keys with the largest μ_c · x / ‖x‖. A token
      may be in several clusters or in none; i sees j when some cluster holds both.
    * causal: i sees the w most recent keys j <= i with c(k_j) = c(q_i). The w best keys of a text are not known before its end,
      so recency selects: later tokens never change the row of query i.

    `causal=True` also removes keys after the query. `shared=True` gives query i the cluster of the key at its own position (the
    causal Routing Transformer, whose queries are its keys).

    In training mode each call, after its choice, updates the centroids by an exponential moving average over the real queries
    and keys x of each cluster, `μ_c ← (decay · μ_c + (1 - decay) · mean x/‖x‖) / ‖…‖`, over the batch and over all ranks where
    torch.distributed is initialised. The first such call initialises the centroids by `fit`. A choice therefore depends on
    earlier calls and on the tokens themselves, never on later tokens of the same text. Centroids are a float32 buffer, also in
    a model cast to 16 bits. They get no gradient; `commitment` is a loss that pulls tokens to their centroids.

    Args:
        heads: query heads, each with centroids of its own; head_dim; clusters: centroids of each head.
        per_cluster: None, or the capacity w of a cluster.
        decay: of the moving average; 1.0 freezes the centroids.
        seed: of the random initial centroids and of the tokens that `fit` starts from.

    Raises ArgumentError for arguments out of range and for operands of other head counts or head_dim.

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

    reads_16_bits = True
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
        initial = torch.randn(heads, self.clusters, head_dim, generator=generator, dtype=torch.float32, device="cpu")
        self.register_buffer("centroids", normalize(initial).to(torch.get_default_device()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    # ---- the dtype of centroids --------------------------------------------------------------------------------------
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KMeans:
        """Casts to 16 bits leave the centroids in float32: steps of weight 1 - decay (0.001 by default), and member sums and
        counts, need more than the 8 or 11 significant bits of a 16-bit dtype.
        """
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

    def choose(self, inputs: RouterInput) -> Pattern:
        self.check(inputs)
        pattern = self._pattern(inputs)
        if self.training and self.decay < 1.0:
            self.update(inputs)
        return pattern

    def products(self, sizes: Sizes) -> int:
        tokens = sizes.n_k + (0 if self.shared else sizes.n_q)
        return sizes.batch * sizes.heads * tokens * self.clusters

    def labels(
        self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, query_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The nearest centroid of each query `(B, H, n_q)` and key `(B, H, n_k)`; -1 for padding."""
        with torch.no_grad():
            inputs = check_inputs(q, k, key_mask, query_mask)
            self.check(inputs)
            with without_autocast(inputs.q):
                return self._labels(inputs)

    def commitment(self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, query_mask: Tensor | None = None) -> Tensor:
        """The commitment loss: the mean of ‖x / ‖x‖ - μ_c(x)‖² over real queries and keys x and heads (keys alone if `shared`).

        A scalar, differentiable in q and k.
        """
        query, key = self.labels(q, k, key_mask=key_mask, query_mask=query_mask)
        terms = [squared_distance(k, self.centroids, key)]
        if not self.shared:
            terms.append(squared_distance(q, self.centroids, query))
        total = torch.stack([distance for distance, _ in terms]).sum()
        return total / sum(count for _, count in terms).clamp(min=1)  # type: ignore[union-attr]

    @torch.no_grad()
    def fit(
        self, q: Tensor, k: Tensor, *, steps: int = 10, key_mask: Tensor | None = None, query_mask: Tensor | None = None
    ) -> KMeans:
        """Spherical k-means on these tokens: distinct random tokens as centroids, then `steps` of Lloyd's algorithm.

        A centroid without members is unchanged. Where torch.distributed is initialised all ranks start from tokens of rank 0
        and all-reduce the member sums.
        """
        inputs = check_inputs(q, k, key_mask, query_mask)
        self.check(inputs)
        with without_autocast(inputs.q):
            self.fit_inputs(inputs, whole("KMeans.fit: steps", steps, 0))
        return self

    # ---- the choice --------------------------------------------------------------------------------------------------
    def check(self, inputs: RouterInput) -> None:
        """Raise ArgumentError for operands of other heads or head_dim than the centroids."""
        self.centroids = _at_least_float32(self.centroids)  # load_state_dict(assign=True) replaces the buffer
        heads, _, dim = self.centroids.shape
        if (inputs.heads, inputs.q.shape[3]) != (heads, dim):
            raise ArgumentError(
                f"KMeans was made for {heads} heads of head_dim {dim}, but q has {inputs.heads} of {inputs.q.shape[3]}; "
                "make one with the numbers of the model."
            )
        if self.shared and inputs.n_q > inputs.n_k:
            raise ArgumentError(
                f"KMeans(shared=True): {inputs.n_q} queries, but {inputs.n_k} keys: a query takes the cluster of the key at "
                "its position; use shared=False where queries come from another text."
            )

    def _labels(self, inputs: RouterInput) -> tuple[Tensor, Tensor]:
        """(query labels `(B, H, n_q)`, key labels `(B, H, n_k)`): nearest centroids, -1 for padding."""
        key = nearest_centroid(inputs.k, self.centroids, inputs.key_mask_by_head())
        if self.shared:
            return key.narrow(2, inputs.offset, inputs.n_q), key
        return nearest_centroid(inputs.q, self.centroids, inputs.query_mask_by_head()), key

    def _pattern(self, inputs: RouterInput) -> Pattern:
        if self.per_cluster is not None and not self.causal:
            return self._balanced(inputs, self.per_cluster)
        return self.pattern_of_labels(*self._labels(inputs))

    def pattern_of_labels(self, query: Tensor, key: Tensor) -> Pattern:
        """The pattern of labels `(B, H, n_q)` and `(B, H, n_k)`, unless the clusters are balanced."""
        pattern: Pattern = clusters(query, key)
        if not self.causal:
            return pattern
        pattern = pattern & past()
        if self.per_cluster is not None:
            pattern = pattern & between(recent_starts(query, key, self.per_cluster))
        return pattern

    def _balanced(self, inputs: RouterInput, per_cluster: int) -> Pattern:
        inputs = inputs.widened()
        key = top_members(inputs.k, self.centroids, inputs.key_mask_by_head(), per_cluster)
        if self.shared:
            return rooms(key.narrow(2, inputs.offset, inputs.n_q), key)
        return rooms(top_members(inputs.q, self.centroids, inputs.query_mask_by_head(), per_cluster), key)

    # ---- updates ----------------------------------------------------------------------------------------------------
    def _tokens(self, inputs: RouterInput) -> list[tuple[Tensor, Tensor | None]]:
        """The token tensors that update the centroids, each with its mask of real tokens."""
        inputs = inputs.widened()
        keys = (inputs.k, inputs.key_mask_by_head())
        return [keys] if self.shared else [(inputs.q, inputs.query_mask_by_head()), keys]

    def update(self, inputs: RouterInput, initial: Callable[[], Tensor] | None = None) -> None:
        """The step of a training call. initial: the first centroids `(H, C, D)`; None: from the tokens of rank 0."""
        if int(self.updates) == 0:
            self.fit_inputs(inputs, _INIT_STEPS, initial)
        else:
            self._step(self._tokens(inputs), self.decay)
        self.updates += 1

    def fit_inputs(self, inputs: RouterInput, steps: int, initial: Callable[[], Tensor] | None = None) -> None:
        """`fit` on checked operands."""
        tokens = self._tokens(inputs)
        self.centroids.copy_(init_centroids(tokens, self.centroids, self.seed) if initial is None else initial())
        for _ in range(steps):
            self._step(tokens, 0.0)
        self.updates.clamp_(min=1)

    def _step(self, tokens: MaskedTokens, decay: float) -> None:
        self.centroids.copy_(update_centroids(self.centroids, member_sums(tokens, self.centroids), decay))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def top_members(x: Tensor, centroids: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """`(B, H, N, C)` bool: whether the token is among the `count` real tokens of its batch item nearest to the centroid."""
    scores = centroid_scores(normalize(x), centroids)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-1), float("-inf"))
    top = scores.topk(min(count, scores.shape[2]), dim=2)
    members = torch.zeros(scores.shape, dtype=torch.bool, device=x.device)
    return members.scatter_(2, top.indices, top.values > float("-inf"))


def recent_starts(query: Tensor, key: Tensor, count: int) -> Tensor:
    """`(B, H, n_q)` int64: the position of the `count`-th most recent key, up to the query's own position, with its label.

    query `(B, H, n_q)` and key `(B, H, n_k)` are labels, -1 = padding. Keys sorted by the code label · n_k + position form one
    run per label, ascending in position; binary search in it finds each query's run and the query's place in the run.
    """
    if can_label(query):
        starts: Tensor = native_starts(query, key, count)
        return starts
    n_q, n_k = query.shape[2], key.shape[2]
    if not n_k:
        return torch.zeros_like(query)
    code = (key * n_k + torch.arange(n_k, device=key.device)).sort(-1).values
    position = torch.arange(n_k - n_q, n_k, device=key.device)
    run_code = query * n_k
    run_begin = torch.searchsorted(code, run_code.contiguous())
    run_end = torch.searchsorted(code, (run_code + position).contiguous(), right=True)
    begin = torch.maximum(run_begin, run_end - count)
    return torch.where(begin < run_end, code.gather(-1, begin.clamp(max=n_k - 1)) - run_code, 0)
