"""A user's program that makes each public call: `make lint` holds its types to `mypy --strict`, and here it runs.

`test_each_public_name_is_used` fails for a public name that this program lacks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, assert_type

import pytest
import torch
from torch import Tensor, nn

import farlight as fl

SOURCE = Path(__file__).read_text(encoding="utf-8")


def test_patterns() -> None:
    mask = torch.rand(8, 8) < 0.5
    primitives: list[fl.Pattern] = [
        fl.full(), fl.causal(), fl.window(2, 0, dilation=2), fl.blocked_window(1, block=4), fl.global_tokens([0, -1]),
        fl.sees_all([0]), fl.seen_by_all(range(2)), fl.random_keys(2, seed=1, causal=True), fl.random_blocks(1, block=4),
        fl.strided(3), fl.offsets([1, 2]), fl.landmarks(4), fl.documents(lengths=[3, 5]), fl.padding([8]),
        fl.blocks(mask[:2, :2], 4), fl.pairs(mask), fl.clusters(torch.zeros(1, 1, 8, dtype=torch.int64)),
        fl.chosen_blocks(torch.zeros(1, 1, 2, 1, dtype=torch.int64), block=4),
        fl.chosen_keys(torch.zeros(1, 1, 8, 1, dtype=torch.int64)), fl.per_head([fl.full(), fl.causal()]),
        fl.neighborhood((3, 4), 3), fl.prefix_lm([3]), fl.parse("window(2) | global_tokens([0])"),
    ]  # fmt: skip
    converted: list[fl.Pattern] = [
        fl.from_dense(mask), fl.from_edges([0], [1], 8), fl.from_sparse(mask.to_sparse()),
        fl.from_mask_mod(lambda b, h, i, j: i >= j, 8, 8),
    ]  # fmt: skip
    presets: list[fl.Pattern] = [
        fl.presets.longformer(4), fl.presets.bigbird(2, 1), fl.presets.etc(2, 1), fl.presets.sparse_transformer(4),
        fl.presets.longnet([2, 4], [1, 2]), fl.presets.streaming(1, 4), fl.presets.star(), fl.presets.logsparse(),
    ]  # fmt: skip
    assert all(isinstance(pattern, fl.Pattern) for pattern in [*primitives, *converted, *presets])
    pattern = assert_type(~(fl.window(2) & fl.causal()) - fl.strided(2) | fl.global_tokens([0]), fl.Pattern)
    assert_type(pattern.dense(8, heads=2), Tensor)
    assert_type(pattern.count(8), int)
    assert_type(pattern.density(8), float)
    assert_type(pattern.allows(0, 1, 8), bool)
    assert fl.Pattern.from_json(assert_type(pattern.to_json(), str)) == pattern


def test_a_graph() -> None:
    networkx: Any = pytest.importorskip("networkx")
    assert_type(fl.from_graph(networkx.path_graph(4)), fl.Pattern)


def test_a_block_mask() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    made = create_block_mask(lambda b, h, i, j: i >= j, None, None, 8, 8, device="cpu", BLOCK_SIZE=4)
    assert_type(fl.from_block_mask(made), fl.Pattern)


def test_attention() -> None:
    q = torch.randn(1, 2, 32, 8)
    flag = bool(torch.rand(()) < 2)
    assert_type(fl.attention(q, q, q, fl.window(4)), Tensor)
    assert_type(fl.attention(q, q, q, fl.window(4), return_lse=False), Tensor)
    assert_type(fl.attention(q, q, q, fl.window(4), return_lse=True), tuple[Tensor, Tensor])
    plan = assert_type(fl.plan(fl.causal(), 32, heads=2), fl.Plan)
    assert_type(fl.attention(q, q, q, plan, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(plan.waste, float)
    assert_type(fl.merge([(q, q[..., 0])]), tuple[Tensor, Tensor])
    assert_type(fl.packed_attention(q[:1], q[:1], q[:1], fl.causal(), [0, q.shape[2]]), Tensor)
    packed = fl.packed_attention(q[:1], q[:1], q[:1], fl.causal(), [0, q.shape[2]], return_lse=True)
    assert_type(packed, tuple[Tensor, Tensor])
    assert_type(fl.explain(q, q, q, fl.causal()), fl.Explanation)
    assert_type(fl.explain(q, q, q, fl.causal()).speedup, float)
    score = assert_type(fl.score.softcap(20.0) + fl.score.alibi([0.5, 0.25]), fl.score.Score)
    assert_type(fl.attention(q, q, q, fl.causal(), score=score, sinks=torch.zeros(2)), Tensor)
    terms: list[fl.score.Score] = [
        fl.score.relative(torch.zeros(2, 63)), fl.score.t5(torch.zeros(32, 2)), fl.score.key_bias(torch.zeros(1, 2, 32)),
    ]  # fmt: skip
    assert all(fl.score.Score.from_json(term.to_json()) == term for term in terms)


def test_routers() -> None:
    q = torch.randn(1, 2, 32, 8)
    blocks = fl.routing.TopBlocks(2, 8, causal=True)
    assert_type(fl.attention(q, q, q, blocks | fl.window(4, 0)), Tensor)
    assert_type(fl.attention(q, q, q, fl.window(4, 0) | blocks, return_lse=True), tuple[Tensor, Tensor])
    assert_type(fl.attention(q, q, q, fl.routing.TopBlocks(lost=0.1, block=8), return_lost=True), tuple[Tensor, ...])
    routers: list[fl.routing.Router] = [
        fl.routing.KMeans(2, 8, 4), fl.routing.LSH(4, 2), fl.routing.TopKeys(4), fl.routing.Gist(blocks, 8),
        fl.routing.PerHeadRouter([blocks, fl.window(2)]), fl.routing.read_router("topkeys(share=0.1)"),
    ]  # fmt: skip
    assert all(isinstance(router(q, q), fl.Pattern) for router in routers[:3])
    assert_type(fl.routing.from_indices(torch.zeros(1, 2, 32, 1, dtype=torch.int64)), fl.Pattern)
    assert_type(fl.routing.gist_attention(q, q, q, fl.window(4)), Tensor)
    assert_type(fl.routing.gist_attention(q, q, q, fl.window(4), return_lse=True), tuple[Tensor, Tensor])
    assert_type(fl.routing.gated_attention(q, q, q, fl.window(4), q, q), Tensor)


def test_analysis() -> None:
    q = torch.randn(1, 2, 32, 8)
    assert_type(fl.retention(q, q, fl.window(4)), fl.Retention)
    assert_type(fl.retention(q, q, fl.window(4)).mass, Tensor)
    fit = assert_type(fl.fit(q, q, keep=0.9), fl.Fit)
    assert_type(fit.density, float)
    assert_type(fl.smallworld(fl.window(4), 32), fl.SmallWorld)
    assert_type(fl.path(fl.window(4), 32, 0, 31), fl.Path)
    assert_type(fl.reach(fl.window(4), 32, 3), fl.Reach)


def test_decoding() -> None:
    q, flag = torch.randn(1, 2, 1, 8), bool(torch.rand(()) < 2)
    cache = fl.KVCache(fl.causal(), dtype=torch.bfloat16)
    cache.append(q, q)
    assert_type(fl.decode(q, cache), Tensor)
    assert_type(fl.decode(q, cache, return_lse=True), tuple[Tensor, Tensor])
    assert_type(fl.step(q, q, q, cache), Tensor)
    assert_type(fl.step(q, q, q, cache, return_lse=True), tuple[Tensor, Tensor])
    assert_type(fl.step(q, q, q, cache, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(fl.KVCache(fl.causal(), dtype="int8").fork(), fl.KVCache)
    assert_type(cache.length, int)


def test_layers() -> None:
    x, pattern = torch.randn(1, 20, 16), fl.window(4)
    assert_type(fl.nn.SparseAttention(16, 2, pattern)(x, x, x), tuple[Tensor, Tensor | None])
    assert_type(fl.nn.SparseEncoder(1, 16, 2, pattern)(x), Tensor)
    assert_type(fl.nn.SparseEncoderLayer(16, 2, pattern)(x), Tensor)
    assert_type(fl.nn.SparseDecoder(1, 16, 2, pattern)(x), Tensor)
    assert_type(fl.nn.SparseDecoderLayer(16, 2, fl.routing.TopKeys(4, causal=True))(x), Tensor)
    assert_type(fl.nn.NativeSparseAttention(16, 2, compress=4, stride=4, block=8, count=2, window=8)(x), Tensor)
    assert_type(fl.nn.LearnedPositions(32, 16)(x), Tensor)
    assert_type(fl.nn.RotaryPositions(16)(x, torch.arange(20)), Tensor)
    assert_type(fl.nn.sparsify(nn.TransformerEncoderLayer(16, 2, batch_first=True), pattern), nn.Module)
    assert_type(fl.nn.scaled_dot_product_attention(x, x, x, pattern=pattern), Tensor)


def test_layouts() -> None:
    layout = assert_type(fl.distributed.Layout.even(32, 2), fl.distributed.Layout)
    assert_type(fl.distributed.Layout.balanced(fl.window(4), 32, 2), fl.distributed.Layout)
    assert_type(layout.shard(torch.zeros(1, 32), 1, 0), Tensor)
    assert_type(layout.position_ids(1), Tensor)
    moved = fl.distributed.communication(layout, fl.window(4), heads=2, head_dim=8)
    assert_type(moved, fl.distributed.Communication)
    assert_type(layout.communication(fl.window(4), heads=2, head_dim=8), fl.distributed.Communication)


def models(model: Any, tokenizer: Any, q: Tensor) -> None:
    """Calls on models, on folders and over ranks: typed here, run by tests/hf, tests/embedding and tests/distributed."""
    fl.hf.register()
    fl.hf.sparsify(fl.hf.lengthen(model, 100), fl.window(4))
    fl.hf.restore(model)

    def seen(observation: fl.hf.Observation) -> None:
        assert_type(observation.q, Tensor)

    with fl.hf.use_pattern(model, fl.window(4), observer=seen):
        model()
    cache = fl.hf.SparseCache(model, fl.presets.streaming(4, 64), dtype=torch.float16)
    model.generate(past_key_values=cache)
    fit = fl.hf.fit(model, ["a text"], tokenizer=tokenizer, keep=0.9)
    assert_type(fl.hf.write_layers(fl.hf.read_layers("fit.json")), str)
    print(fit, fl.evaluate(model, tokenizer, [fl.window(4)], tasks=["passkey"], lengths=[64], questions=2))
    layout = fl.distributed.Layout.even(32, 2)
    assert_type(fl.distributed.attention(q, q, q, fl.window(4), layout=layout), Tensor | tuple[Tensor, Tensor])
    fl.hf.sequence_collator(layout, 0)
    embedder = assert_type(fl.embedding.Embedder.load(None, fl.window(4), positions=64), fl.embedding.Embedder)
    assert_type(embedder.embed(["a text"]), Tensor)
    assert_type(embedder.read([1, 2]), fl.embedding.Encoding)
    assert_type(fl.embedding.read_books(embedder, [("name", "text")]), fl.embedding.Library)
    fl.embedding.encode_document(embedder, "name", "text")
    index = fl.embedding.Index("folder", embedder)
    assert_type(index.add([("name", "text")]), int)
    assert_type(index.search("query", 3), list[fl.embedding.IndexHit])
    fl.embedding.SparseTransformer("folder", pattern=fl.window(4))


def test_errors() -> None:
    for kind in (fl.ArgumentError, fl.PatternError, fl.PlanError, fl.UnsupportedError, fl.DistributedError):
        assert issubclass(kind, fl.FarlightError)
    with pytest.raises(fl.PatternError):
        fl.parse("window(")


# Parts of the library that users reach by other names: what a score becomes, pattern primitives of gists.
INNER = {
    "fl.score.ScoreTerms",
    "fl.score.lower",
    "fl.routing.between",
    "fl.routing.meets",
    "fl.routing.rooms",
    "fl.routing.unseen",
}


def test_each_public_name_is_used() -> None:
    names = set()
    for name in fl.__all__:
        value = getattr(fl, name)
        inner = dir(value) if value in (fl.hf, fl.embedding) else getattr(value, "__all__", [])
        names |= {f"fl.{name}.{each}" for each in inner} or {f"fl.{name}"}
    assert not {name for name in names - INNER if not re.search(rf"{re.escape(name)}\b", SOURCE)}
