"""Error messages of routers: one row for each place that raises, with the full text."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

import farlight as fl
from farlight.errors import ArgumentError, FarlightError, PatternError
from farlight.nn import NativeSparseAttention
from farlight.routing import (
    LSH,
    KMeans,
    TopBlocks,
    TopKeys,
    between,
    from_indices,
    gated_attention,
    gist_attention,
    meets,
    read_router,
    rooms,
    unseen,
)

Q, K = torch.zeros(1, 4, 8, 2), torch.zeros(1, 2, 8, 2)
REAL = torch.ones(1, 8, dtype=torch.bool)

# (bad call, type, the whole text of the error)
TABLE: list[tuple[Callable[[], object], type[FarlightError], str]] = [
    # what every router is called with
    (
        lambda: TopKeys(1)(Q[0], K),
        ArgumentError,
        "router: q is (4, 8, 2) of torch.float32; a floating point tensor (B, H, N, D) is needed.",
    ),
    (
        lambda: TopKeys(1)(Q, K.long()),
        ArgumentError,
        "router: k is (1, 2, 8, 2) of torch.int64; a floating point tensor (B, H, N, D) is needed.",
    ),
    (lambda: TopKeys(1)(Q, None), ArgumentError, "router: k is NoneType; a floating point tensor (B, H, N, D) is needed."),  # type: ignore[arg-type]
    (
        lambda: TopKeys(1)(Q, K[..., :1]),
        ArgumentError,
        "router: q is (1, 4, 8, 2) and k is (1, 2, 8, 1): batch and head_dim must agree.",
    ),
    (
        lambda: TopKeys(1)(Q[:, :3], K),
        ArgumentError,
        "router: q has 3 heads and k has 2: the first must be a multiple of the second, both >= 1.",
    ),
    (
        lambda: TopKeys(1)(Q, K, key_mask=REAL[:, :3]),
        ArgumentError,
        "router: key_mask is (1, 3) of torch.bool; a bool tensor (1, 8), True where a token is real, is needed.",
    ),
    (
        lambda: TopKeys(1)(Q, K, query_mask=REAL.long()),
        ArgumentError,
        "router: query_mask is (1, 8) of torch.int64; a bool tensor (1, 8), True where a token is real, is needed.",
    ),
    (
        lambda: TopKeys(1)(Q, K[:, :, :5], key_mask=REAL[:, :5]),
        ArgumentError,
        "router: key_mask was given for 5 keys, but there are 8 queries, so that it cannot say which of these are real; "
        "pass query_mask too.",
    ),
    (
        lambda: TopKeys(1) | 3,  # type: ignore[operator]
        ArgumentError,
        "`router | 3`: int is neither a router nor a pattern; join routers with routers and patterns.",
    ),
    # amounts
    (lambda: TopKeys(), ArgumentError, "TopKeys: nothing given; say how much to take by exactly one of count, share and mass."),
    (
        lambda: TopBlocks(3, share=0.1),
        ArgumentError,
        "TopBlocks: count and share given; say how much to take by exactly one of count, share, mass and lost.",
    ),
    (lambda: TopBlocks(0), PatternError, "TopBlocks: count = 0: it must be a whole number >= 1."),
    (lambda: TopKeys(share=0.0), ArgumentError, "TopKeys: share = 0.0: it must be a number in 0 < share <= 1."),
    (lambda: TopKeys(mass=1.5), ArgumentError, "TopKeys: mass = 1.5: it must be a number in 0 < mass <= 1."),
    (lambda: TopKeys(mass=True), ArgumentError, "TopKeys: mass = True: it must be a number in 0 < mass <= 1."),
    # blocks
    (lambda: TopBlocks(1, 0), PatternError, "TopBlocks: block = 0: it must be a whole number >= 1."),
    (lambda: TopBlocks(1, 4, 0), PatternError, "TopBlocks: query_block = 0: it must be a whole number >= 1."),
    (
        lambda: TopBlocks(1, score="max"),
        ArgumentError,
        "TopBlocks: score = 'max' is unknown; use one of 'mean', 'minmax', 'softmax'.",
    ),
    (
        lambda: TopBlocks(1, 4, 4, causal=True)(Q[:, :, :6], K),
        ArgumentError,
        "TopBlocks(query_block=4, causal=True): the first query stands at position 2, inside a block, whose choice belongs to "
        "the query at 0; pass queries from there on, or use query_block=1.",
    ),
    # indices
    (
        lambda: from_indices(Q),
        ArgumentError,
        "from_indices: indices are torch.float32; pass an integer tensor (B, rows, m) or (B, H, rows, m).",
    ),
    (
        lambda: from_indices([1]),
        ArgumentError,
        "from_indices: indices are list; pass an integer tensor (B, rows, m) or (B, H, rows, m).",
    ),  # type: ignore[arg-type]
    (
        lambda: from_indices(torch.zeros(2, 3, dtype=torch.int64)),
        ArgumentError,
        "from_indices: indices have shape (2, 3); pass (B, rows, m) or (B, H, rows, m).",
    ),
    (
        lambda: from_indices(torch.zeros(1, 2, 3, dtype=torch.int64), query_block=2),
        ArgumentError,
        "from_indices: query_block = 2 without block: single keys are listed row by row; give block.",
    ),
    # clusters and buckets
    (lambda: KMeans(1, 2, 0), PatternError, "KMeans: clusters = 0: it must be a whole number >= 1."),
    (lambda: KMeans(1, 2, 3, per_cluster=0), PatternError, "KMeans: per_cluster = 0: it must be a whole number >= 1."),
    (
        lambda: KMeans(1, 2, 3, decay=1.5),
        ArgumentError,
        "KMeans: decay = 1.5: the share of a centroid that stays lies between 0 and 1.",
    ),
    (
        lambda: KMeans(3, 2, 3)(Q, K),
        ArgumentError,
        "KMeans was made for 3 heads of head_dim 2, but q has 4 of 2; make one with the numbers of the model.",
    ),
    (
        lambda: KMeans(4, 2, 3, shared=True)(Q, K[:, :, :5]),
        ArgumentError,
        "KMeans(shared=True): 8 queries, but 5 keys: a query takes the cluster of the key at its position; use shared=False "
        "where queries come from another text.",
    ),
    (lambda: LSH(1), PatternError, "LSH: buckets = 1: it must be a whole number >= 2."),
    (lambda: LSH(3), ArgumentError, "LSH: buckets = 3 is odd; a rotated axis gives two buckets, so pass an even number."),
    (lambda: LSH(2, 0), PatternError, "LSH: rounds = 0: it must be a whole number >= 1."),
    (
        lambda: LSH(2, shared=True)(Q, K[:, :, :5]),
        ArgumentError,
        "LSH(shared=True): 8 queries, but 5 keys: a query takes the bucket of the key at its position; use shared=False where "
        "queries come from another text.",
    ),
    # primitives
    (
        lambda: rooms(torch.ones(4, 2) > 0, torch.ones(4, 3) > 0),
        PatternError,
        "rooms: query_members names 2 rooms, key_members 3; they must be the same rooms.",
    ),
    (
        lambda: rooms(torch.ones(4, 2) > 0).dense(4, 5),
        PatternError,
        "rooms: members of 4 keys, but there are 5 keys; give one row for each.",
    ),
    (
        lambda: meets([[0, 1, 2]] * 4, [[0, 1]] * 4),
        PatternError,
        "meets: queries have labels of 3 rounds, keys of 2; give keys as many, or one for all.",
    ),
    (
        lambda: meets([[0, 1]] * 4).dense(4, 5),
        PatternError,
        "meets: labels of 4 keys, but there are 5 keys; give one row for each.",
    ),
    (
        lambda: between([0, 1]).dense(4),
        PatternError,
        "between: starts: it has 2 rows, but there are 4 queries and 4 positions; give 4 rows, one for each query, or 4, one "
        "for each position.",
    ),
    (lambda: unseen("window(2)", 2, 8), PatternError, "unseen: str is not a pattern; give the pattern of what is seen."),
    (lambda: unseen(fl.full(), 2, 8, 3, 3), PatternError, "unseen: level = 3 does not exist among 3 levels; use 0 … 2."),
    (
        lambda: unseen(fl.full(), 2, 9).dense(9, 4),
        PatternError,
        "unseen: 9 keys make 5 cells of 2, but n_k = 4; pass one summary for each cell.",
    ),
    # attention with gates and summaries
    (
        lambda: gated_attention(Q, K, K, fl.full(), Q[:, :1], K),
        ArgumentError,
        "gated_attention: q_score is (1, 1, 8, 2) of torch.float32; (1, 4, 8, S) of torch.float32 is needed.",
    ),
    (
        lambda: gated_attention(Q, K, K, fl.full(), Q, K[..., :1]),
        ArgumentError,
        "gated_attention: q_score has width 2 and k_score 1; they must be equal.",
    ),
    (
        lambda: gist_attention(Q, K, K, TopBlocks(1)),  # type: ignore[arg-type]
        ArgumentError,
        "gist_attention: TopBlocks is not a pattern; pass e.g. TopBlocks(8, 64)(q, k).",
    ),
    (
        lambda: gist_attention(Q, K, K, fl.full(), key_mask=REAL[:, :3]),
        ArgumentError,
        "gist_attention: key_mask is (1, 3) of torch.bool; a bool tensor (1, 8) is needed.",
    ),
    # layers
    (
        lambda: NativeSparseAttention(10, 4),
        ArgumentError,
        "NativeSparseAttention: embed_dim = 10, num_heads = 4, kv_heads = 4: each must divide the one before it.",
    ),
    (
        lambda: NativeSparseAttention(8, 4, stride=3),
        ArgumentError,
        "NativeSparseAttention: stride = 3 must divide compress = 32 and block = 64, so that segments and blocks line up.",
    ),
    (
        lambda: NativeSparseAttention(8, 4, rotate=3),
        ArgumentError,
        "NativeSparseAttention: rotate is int; pass a function of (tensor, positions), or None.",
    ),
    (
        lambda: NativeSparseAttention(8, 4)(Q),
        ArgumentError,
        "NativeSparseAttention: x is (1, 4, 8, 2); (batch, tokens, 8) is needed.",
    ),
    # text
    (
        lambda: read_router("topblocks("),
        PatternError,
        "cannot read the router 'topblocks(': the ( at column 10 is never closed; write ) where it ends.",
    ),
    (
        lambda: read_router("topblocks(3, blok=4)"),
        PatternError,
        "cannot read the router 'topblocks(3, blok=4)': topblocks(3, blok=4): TopBlocks.__init__() got an unexpected keyword "
        "argument 'blok'",
    ),
    (
        lambda: read_router("topkeys(3) + window(2)"),
        PatternError,
        "cannot read the router 'topkeys(3) + window(2)': a router may stand alone, in per_head([…]), or be "
        "joined by |, &, - and ~; 'topkeys(3) + window(2)' is something else.",
    ),
    (
        lambda: read_router("topkeys(__import__('os'))"),
        PatternError,
        "cannot read the router \"topkeys(__import__('os'))\": topkeys(__import__('os')): malformed node or string on line 1: "
        "<ast.Call object>",
    ),
    (
        lambda: read_router("window(-1) | topkeys(2)"),
        PatternError,
        "window: left = -1: it must be a whole number >= 0.",
    ),
    (
        lambda: read_router(3),  # type: ignore[arg-type]
        PatternError,
        "read_router: text of at most 4000000 characters is needed, such as 'topblocks(8) | window(16)'.",
    ),
]


@pytest.mark.parametrize("number", range(len(TABLE)))
def test_error(number: int) -> None:
    call, kind, text = TABLE[number]
    with pytest.raises(kind) as caught:
        call()
    assert re.sub(r" object at 0x[0-9a-f]+", " object", str(caught.value)) == text
