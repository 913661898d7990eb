"""Routers over ranks: the pattern of the whole sequence, from what each rank computes of its own tokens.

`KMeans` and `LSH` gather one label for each token and head: centroids are equal on all ranks, and their moving averages add the
members of all ranks. `TopBlocks` gathers the summaries of the key blocks, each rank chooses for its own queries, and the
lists of block numbers are gathered. No key, value or query is gathered. The links are those of one process, except where two
scores differ by no more than rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farlight.distributed.collectives import Channel
from farlight.distributed.layout import Layout
from farlight.errors import UnsupportedError
from farlight.inputs import without_autocast
from farlight.patterns import per_head
from farlight.patterns.expression import Pattern
from farlight.patterns.membership import rooms
from farlight.routing.base import CombinedRouter, ConstantRouter, Router, RouterInput, check_inputs
from farlight.routing.budget import concat_selections
from farlight.routing.centroids import centroid_scores, normalize
from farlight.routing.head_routers import PerHeadRouter
from farlight.routing.kmeans import KMeans
from farlight.routing.lsh import LSH, hash_buckets, rotations
from farlight.routing.topblocks import TopBlocks

__all__ = ["choose_over_ranks", "text_of"]


@dataclass(frozen=True)
class _Shards:
    """The operands of a choice over ranks: q and k of this rank as a router reads them, and who owns which tokens."""

    local: RouterInput
    queries: Layout
    keys: Layout
    channel: Channel

    @property
    def offset(self) -> int:
        """The position of query row 0 of the whole sequence."""
        return self.keys.n - self.queries.n

    def gathered(self, x: Tensor, layout: Layout, dim: int) -> Tensor:
        """The tensor of all ranks, on the CPU, where the exchange is derived from it."""
        is_index = x.dtype == torch.int64
        whole = layout.unshard(x.int() if is_index else x, dim, self.channel.group).cpu()
        return whole.long() if is_index else whole


def text_of(router: object) -> str:
    """What two ranks must have in common of a router: its structure and numbers, not its centroids."""
    match router:
        case Pattern():
            return router.text
        case ConstantRouter():
            return router.pattern.text
        case CombinedRouter():
            return f"({text_of(router.left)} {router.symbol} {text_of(router.right)})"
        case PerHeadRouter():
            return f"per_head([{', '.join(map(text_of, router.parts))}])"
    return repr(router)


@torch.no_grad()
def choose_over_ranks(router: Router, q: Tensor, k: Tensor, queries: Layout, keys: Layout, channel: Channel) -> Pattern:
    """The pattern that the router chooses for the whole sequence, equal on all ranks. Collective.

    Raises UnsupportedError for a router without a choice over ranks, and for layouts that cut its blocks; ArgumentError for
    `TopBlocks(lost=…)`.
    """
    inputs = check_inputs(q, k)
    with without_autocast(inputs.q):
        return _choose(router, _Shards(inputs, queries, keys, channel))


def _choose(router: Router | Pattern, shards: _Shards) -> Pattern:
    match router:
        case Pattern():
            return router
        case ConstantRouter():
            return router.pattern
        case CombinedRouter():
            return router.joined(_choose(router.left, shards), _choose(router.right, shards))
        case PerHeadRouter():
            return per_head([_choose(part, _of_head(shards, head)) for head, part in enumerate(router.parts)])
        case KMeans():
            return _clusters(router, shards)
        case LSH():
            return _buckets(router, shards)
        case TopBlocks():
            return _blocks(router, shards)
    raise UnsupportedError(
        f"{type(router).__name__} over ranks is not served: it compares queries with keys of other ranks. KMeans, LSH and "
        "TopBlocks, alone, joined by |, & and -, and per head, choose from labels or block summaries; or pass a pattern."
    )


def _of_head(shards: _Shards, head: int) -> _Shards:
    inputs = shards.local
    key_head = head // (inputs.heads // inputs.kv_heads)
    return replace(shards, local=replace(inputs, q=inputs.q[:, head : head + 1], k=inputs.k[:, key_head : key_head + 1]))


# ---- labels ---------------------------------------------------------------------------------------------------------
def _clusters(router: KMeans, shards: _Shards) -> Pattern:
    inputs = shards.local
    router.check(inputs)
    if router.per_cluster is not None and not router.causal:
        pattern = _balanced(router, router.per_cluster, shards)
    else:
        query, key = router.labels(inputs.q, inputs.k)
        whole = shards.gathered(key, shards.keys, 2)
        pattern = router.pattern_of_labels(_queries_of(router, query, whole, shards, 2), whole)
    if router.training and router.decay < 1.0:
        router.update(inputs, lambda: _initial_centroids(router, shards))
    return pattern


def _queries_of(router: KMeans | LSH, query: Tensor | None, whole_key: Tensor, shards: _Shards, dim: int) -> Tensor:
    """The labels of all queries; shared: those of the keys at their positions."""
    if router.shared:
        return whole_key.narrow(dim, shards.offset, shards.queries.n)
    assert query is not None
    return shards.gathered(query, shards.queries, dim)


def _balanced(router: KMeans, per_cluster: int, shards: _Shards) -> Pattern:
    """Clusters of the nearest `per_cluster` tokens: the best of each rank are candidates, of which the best are members."""
    key = _members(shards, shards.local.k, shards.keys, router.centroids, per_cluster)
    if router.shared:
        return rooms(key.narrow(2, shards.offset, shards.queries.n), key)
    return rooms(_members(shards, shards.local.q, shards.queries, router.centroids, per_cluster), key)


def _members(shards: _Shards, x: Tensor, layout: Layout, centroids: Tensor, count: int) -> Tensor:
    """`(B, H, n, C)` bool: `top_members` of the tokens of all ranks."""
    scores, channel = centroid_scores(normalize(x), centroids), shards.channel
    lengths = [min(count, length) for length in layout.lengths]
    top = scores.topk(lengths[channel.rank], dim=2)
    position = layout.position_ids(channel.rank).to(x.device)[top.indices]
    # Candidates of all ranks side by side; those of one rank are its best.
    candidates = Layout([sum(lengths[:rank]) for rank in range(channel.world + 1)])
    values, positions = (shards.gathered(part, candidates, 2) for part in (top.values, position))
    best = values.topk(min(count, layout.n), dim=2).indices
    members = torch.zeros(*scores.shape[:2], layout.n, scores.shape[3], dtype=torch.bool)
    return members.scatter_(2, positions.gather(2, best), True)


def _initial_centroids(router: KMeans, shards: _Shards) -> Tensor:
    """`(H, C, D)`: the tokens that one process would have drawn from the whole sequence, each from the rank that owns it."""
    inputs, (heads, count, _) = shards.local, router.centroids.shape
    operands = [(inputs.k, shards.keys)] if router.shared else [(inputs.q, shards.queries), (inputs.k, shards.keys)]
    pool = inputs.batch * sum(layout.n for _, layout in operands)
    order = torch.rand(heads, pool, generator=torch.Generator().manual_seed(router.seed), device="cpu").argsort(1)[:, :count]
    drawn, first = torch.zeros_like(router.centroids)[:, : order.shape[1]], 0
    for x, layout in operands:
        vectors = normalize(x).repeat_interleave(heads // x.shape[1], 1)
        head, place = ((order >= first) & (order < first + inputs.batch * layout.n)).nonzero(as_tuple=True)
        item, position = ((order[head, place] - first) // layout.n, (order[head, place] - first) % layout.n)
        owned = torch.from_numpy(layout.owner_of(position.numpy()) == shards.channel.rank)
        local = torch.from_numpy(layout.local_index(position.numpy()))
        drawn[head[owned], place[owned]] = vectors[item[owned], head[owned], local[owned]].to(drawn.dtype)
        first += inputs.batch * layout.n
    out = router.centroids.clone()
    out[:, : order.shape[1]] = shards.channel.total("initial centroids", drawn)
    return out


def _buckets(router: LSH, shards: _Shards) -> Pattern:
    inputs = shards.local
    rotation = rotations(router.seed, router.rounds, inputs.heads, inputs.q.shape[3], router.buckets // 2).to(inputs.q)
    key = shards.gathered(hash_buckets(inputs.k, rotation, None), shards.keys, 3)
    query = None if router.shared else hash_buckets(inputs.q, rotation, None)
    return router.pattern_of_buckets(_queries_of(router, query, key, shards, 3), key)


# ---- block summaries ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Run(RouterInput):
    """Consecutive queries of a rank before all keys: as `RouterInput`, but of stated positions."""

    first: int = 0
    keys: int = 0

    @property
    def n_k(self) -> int:
        return self.keys

    @property
    def offset(self) -> int:
        return self.first


def _blocks(router: TopBlocks, shards: _Shards) -> Pattern:
    # Before anything is sent, on all ranks: a rank without queries would not meet the refusal in its own choice.
    router.require_summaries("attention over ranks")
    inputs, channel = shards.local, shards.channel
    key_blocks = _in_blocks(shards.keys, router.block, 0, "keys")
    query_blocks = _in_blocks(shards.queries, router.query_block, shards.offset, "queries")
    summaries = [router.summary(part) for part in _pieces(inputs.k, shards.keys, channel.rank)]
    if not summaries:
        summaries = [router.summary(inputs.k)]
    tables = [torch.cat(parts, 2) for parts in zip(*summaries, strict=True)]
    summary = [key_blocks.unshard(table, 2, channel.group) for table in tables]
    lists = [
        router.select_lists(_Run(part, inputs.k, None, None, lo + shards.offset, shards.keys.n), summary)
        for part, (lo, _) in zip(
            _pieces(inputs.q, shards.queries, channel.rank), shards.queries.pieces(channel.rank), strict=True
        )
    ]
    heads = inputs.kv_heads if router.per == "group" else inputs.heads
    lists_here = concat_selections([torch.full((inputs.batch, heads, 0, 0), -1, device=inputs.q.device), *lists])
    width = int(channel.numbers("lists", [lists_here.shape[3]], lists_here.device).max())
    padded = torch.nn.functional.pad(lists_here, (0, width - lists_here.shape[3]), value=-1)
    chosen = shards.gathered(padded, query_blocks, 2)
    every = _Run(inputs.q.new_empty(0).expand(inputs.batch, inputs.heads, shards.queries.n, 0), inputs.k, None, None)
    every = replace(every, first=shards.offset, keys=shards.keys.n)
    return router.pattern_of_lists(chosen, every, shards.offset)


def _pieces(x: Tensor, layout: Layout, rank: int) -> list[Tensor]:
    """The runs of positions of a rank's tensor `(B, H, n_local, D)`."""
    return list(x.split([hi - lo for lo, hi in layout.pieces(rank)], 2)) if x.shape[2] else []


def _in_blocks(layout: Layout, block: int, offset: int, what: str) -> Layout:
    """The layout of blocks of tokens, token 0 at position `offset`. Raises UnsupportedError where it cuts a block."""
    if block == 1:
        return layout
    for cut in layout.cuts:
        if (cut + offset) % block and cut != layout.n:
            raise UnsupportedError(
                f"TopBlocks over ranks: the layout of the {what} cuts at position {cut + offset}, inside a block of {block}, "
                f"whose summary no rank could make alone; cut at multiples, as in Layout.even(n, world, multiple={block})."
            )
    return Layout([-(-cut // block) for cut in layout.cuts], layout.owners, layout.world)
