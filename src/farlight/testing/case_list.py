"""`CASES`: the shared list of attention problems on which every backend, plan and cache is compared with the specification.

One list for all of them, so a case that exposed one fault is run everywhere from then on; each fix of a kernel or plan adds the
case that exposes it. Names identify cases and seed their tensors: do not rename them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import farlight.patterns as fl
from farlight.patterns import presets
from farlight.testing.cases import Case, Layout, bits, table

__all__ = ["CASES", "case"]


def _sizes() -> Iterator[Case]:
    """Lengths around multiples of the row blocks of 32, 64 and 128 rows; no rows, no keys; positions outside the text."""
    near = fl.window(5, 3) | fl.global_tokens([0])
    for n in (1, 2, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 211, 257):
        yield Case(f"window and a lighthouse, n={n}", near, n, head_dim=8)
    yield Case("no token", fl.window(4), 0)
    yield Case("no query", fl.window(4), 0, 9)
    yield Case("no key", fl.window(4), 9, 0, q_offset=0)
    yield Case("no key by default", fl.full(), 3, 0)
    yield Case("full", fl.full(), 65)
    yield Case("full, prime", fl.full(), 101, 67, q_offset=0, heads=3)
    yield Case("causal", fl.causal(), 129, head_dim=32)
    yield Case("causal, one row per key", fl.causal(), 1)
    yield Case("causal, last queries", fl.causal(), 7, 50)
    yield Case("causal, one query", fl.causal() & fl.window(16, 0), 1, 97)
    yield Case("causal, first queries", fl.causal(), 20, 61, q_offset=0)
    yield Case("causal, rows before the text", fl.causal(), 50, 7)
    yield Case("window, rows before the text", fl.window(4), 50, 20)
    yield Case("window, rows far before the text", fl.window(3), 40, 64, q_offset=-37)
    yield Case("window, rows behind the text", fl.window(9), 40, 33, q_offset=20)
    yield Case("window, all rows behind the text", fl.window(5), 8, 16, q_offset=100)
    yield Case("full, rows before the text", fl.full(), 40, 33, q_offset=-100)
    yield Case("long row", fl.sees_all([-1]) | fl.window(2), 3, 20_011, head_dim=8, heads=1)
    yield Case("long rows, per head", fl.per_head([fl.causal(), fl.window(9_000)]), 2, 18_001, head_dim=8)
    yield Case("many rows, few keys", fl.strided(5) | fl.causal(), 1500, 3, q_offset=-2, head_dim=8)


def _positional() -> Iterator[Case]:
    """Patterns of distances: windows, dilations, strides, blocks, landmarks, offsets."""
    yield Case("window, itself only", fl.window(0), 70)
    yield Case("window, left only", fl.window(7, 0), 83)
    yield Case("window, right only", fl.window(0, 40), 83)
    yield Case("window, wider than the text", fl.window(400), 45)
    yield Case("window, wide", fl.window(64), 300, heads=1)
    yield Case("dilated window", fl.window(3, dilation=2), 61)
    yield Case("dilated window, one side", fl.window(4, 0, dilation=3), 100, 130)
    yield Case("dilated window, rows before the text", fl.window(2, dilation=5), 64, 40)
    yield Case("dilated wider than the text", fl.window(2, dilation=64), 130)
    yield Case("strided", fl.strided(7), 101)
    yield Case("strided by one", fl.strided(1), 40)
    yield Case("strided beyond the text", fl.strided(200), 90)
    yield Case("strided with a phase", fl.strided(4, phase=3), 67)
    yield Case("strided, phase by head", fl.strided(3, phase="head"), 80, heads=4)
    yield Case("strided, last queries", fl.strided(6), 25, 90)
    yield Case("strided, rows before the text", fl.strided(4), 60, 33)
    yield Case("blocked window", fl.blocked_window(1, block=16), 100)
    yield Case("segments", fl.blocked_window(0, block=33), 100, head_dim=24)
    yield Case("blocked window, left only", fl.blocked_window(2, 0, block=8), 61, 80)
    yield Case("blocked window, rows before the text", fl.blocked_window(1, 0, block=10), 60, 25)
    yield Case("landmarks", fl.landmarks(9), 100)
    yield Case("landmarks of three", fl.landmarks(16, 3), 61, 77)
    yield Case("landmarks, none yet", fl.landmarks(64), 20, 20)
    yield Case("offsets", fl.offsets([0, -1, -2, -4, -8, -16, -32, 5]), 90)
    yield Case("offsets, none", fl.offsets([]), 20)


def _tokens() -> Iterator[Case]:
    """Patterns of chosen tokens: global tokens, documents, padding."""
    yield Case("lighthouses at both ends", fl.global_tokens([0, -1]), 65)
    yield Case("scattered lighthouses", fl.global_tokens([3, 40, 41, 77, -2]), 131)
    yield Case("scattered lighthouses and a window", fl.window(6) | fl.global_tokens([3, 40, 77]), 130, 140)
    yield Case("lighthouses by mask", fl.global_tokens(bits(1, 97, share=0.06)), 97)
    yield Case("lighthouses by mask, per item", fl.global_tokens(bits(2, 3, 50, share=0.1)), 30, 50, batch=3)
    yield Case("no lighthouse", fl.global_tokens([]), 30)
    yield Case("lighthouses outside the queries", fl.global_tokens([0, 1]), 10, 64)
    yield Case("sees all", fl.sees_all([5, 33, -1]), 66)
    yield Case("seen by all, consecutive", fl.seen_by_all(range(20, 50)), 70)
    yield Case("seen by all, scattered", fl.seen_by_all([0, 9, 63, 64]), 100)
    yield Case("seen by all, by mask per item", fl.seen_by_all(bits(3, 2, 70, share=0.3)), 40, 70, batch=2)
    yield Case("neighborhood of a picture", fl.neighborhood((9, 11), 5), 99)
    yield Case("neighborhood, dilated and causal", fl.neighborhood((8, 10), (3, 4), (2, 1), (False, True)), 80, heads=3)
    yield Case(
        "neighborhood of a film, in a text", fl.neighborhood((3, 5, 6), (2, 3, 3), (1, 1, 2)) | fl.global_tokens([-1]), 92
    )
    yield Case("prefix of a language model", fl.prefix_lm([20, 0]), 50, batch=2)
    yield Case("documents by length", fl.documents(lengths=[1, 30, 33, 2]), 70)
    yield Case("documents by length, per item", fl.documents(lengths=[[40, 30], [7, 0, 20]]), 70, batch=2)
    yield Case("documents by id", fl.documents([0] * 20 + [7] * 33 + [3] * 14), 67)
    yield Case("documents that come back", fl.documents(table(4, 80, low=-1, high=4)), 80)
    yield Case("documents per item, causal", fl.documents(table(5, 2, 66, high=3).sort(1).values) & fl.causal(), 66, batch=2)
    yield Case("documents, last queries", fl.documents(lengths=[10, 45]), 20, 64)
    yield Case("documents, rows before the text", fl.documents(lengths=[9, 20]), 50, 30)
    yield Case("padding by length", fl.padding([33, 0, 64]), 64, batch=3)
    yield Case("padding by mask", fl.padding(bits(6, 2, 75, share=0.6)), 40, 75, batch=2)
    yield Case("padding and a causal window", fl.causal() & fl.window(10) & fl.padding([50, 3]), 61, batch=2)


def _random() -> Iterator[Case]:
    """Random keys and blocks."""
    yield Case("random keys", fl.random_keys(3), 100)
    yield Case("random keys, causal", fl.random_keys(4, seed=9, causal=True), 100, heads=3)
    yield Case("random keys, more than there are", fl.random_keys(20), 33, 12)
    yield Case("random keys, rows before the text", fl.random_keys(3, causal=True), 40, 15)
    yield Case("random keys without a window", fl.random_keys(6) - fl.window(8), 90)
    yield Case("random keys of a document", fl.random_keys(9) & fl.documents(lengths=[40, 41]), 81)
    yield Case("random keys twice", fl.random_keys(4) | fl.random_keys(4, seed=2**40 + 3), 77)
    yield Case("random blocks", fl.random_blocks(2, block=16), 130)
    yield Case("random blocks, causal", fl.random_blocks(3, block=10, seed=4, causal=True), 95, heads=3)
    yield Case("random blocks, last queries", fl.random_blocks(1, block=32), 50, 200)


def _content() -> Iterator[Case]:
    """Patterns given as tables: masks, block layouts, clusters, chosen blocks and keys."""
    yield Case("a mask with holes", fl.pairs(bits(10, 70, 70)), 70)
    yield Case("a sparse mask", fl.pairs(bits(11, 97, 97, share=0.02)), 97)
    yield Case("a nearly full mask", fl.pairs(bits(12, 65, 65, share=0.98)), 65)
    yield Case("a mask per head", fl.pairs(bits(13, 3, 40, 52)), 40, 52, heads=3)
    yield Case("a mask per item and head", fl.pairs(bits(14, 2, 2, 33, 33, share=0.3)), 33, batch=2)
    yield Case("a mask by position, last queries", fl.pairs(bits(15, 60, 60)), 17, 60)
    yield Case("a mask on a causal window", fl.pairs(bits(16, 128, 128, share=0.9)) & fl.window(20, 0), 128)
    yield Case("block layout", fl.blocks(bits(17, 5, 5), 16), 77)
    yield Case("block layout per head", fl.blocks(bits(18, 3, 4, 4), 32), 120, heads=3)
    yield Case("block layout, last queries", fl.blocks(bits(19, 4, 9), 8), 30, 70)
    yield Case("clusters", fl.clusters(table(20, 1, 2, 90, low=-1, high=5)), 90)
    yield Case("clusters per item", fl.clusters(table(21, 2, 3, 64, high=4)), 64, batch=2, heads=3)
    yield Case(
        "clusters with keys of their own", fl.clusters(table(22, 2, 40, high=3), table(23, 2, 66, low=-1, high=3)), 40, 66
    )
    yield Case("clusters of one", fl.clusters(torch.arange(50)), 50)
    yield Case("clusters, causal", fl.clusters(table(24, 100, high=6)) & fl.causal(), 100)
    yield Case("clusters that agree with nothing", fl.clusters([0] * 30, [1] * 40), 30, 40)
    yield Case("chosen blocks", fl.chosen_blocks(table(25, 1, 2, 5, 3, low=-1, high=5), block=16), 80)
    yield Case(
        "chosen blocks, smaller queries",
        fl.chosen_blocks(table(26, 2, 1, 12, 2, low=-1, high=3), block=32, query_block=8),
        96,
        batch=2,
    )
    yield Case("chosen keys", fl.chosen_keys(table(27, 2, 60, 5, low=-1, high=60)), 60)
    yield Case("chosen keys, last queries", fl.chosen_keys(table(28, 2, 2, 9, 7, low=-1, high=80)), 9, 80, batch=2)
    yield Case("chosen keys, none", fl.chosen_keys(torch.full((40, 2), -1)), 40)


def _combined() -> Iterator[Case]:
    """Unions, intersections, differences and complements; patterns per head; empty results."""
    yield Case("per head", fl.per_head([fl.window(3), fl.causal(), fl.random_keys(2), fl.window(3)]), 90, heads=4)
    yield Case("per head, some empty", fl.per_head([fl.offsets([]), fl.full(), fl.strided(3)]), 50, heads=3)
    yield Case("per head, dilations", fl.per_head([fl.window(4, dilation=d) for d in (1, 2, 3, 5)]), 110, heads=4)
    yield Case("skim", fl.window(8) | fl.global_tokens([0, -1]) | fl.random_keys(3), 200)
    yield Case("skim, causal", fl.causal() & (fl.window(8) | fl.global_tokens([0, 50]) | fl.random_keys(3)), 150)
    yield Case("two strides", fl.strided(4) | fl.strided(6), 100)
    yield Case("strides, one inside the other", fl.strided(2) | fl.strided(4) | fl.window(3), 100)
    yield Case("stride of the past or of random keys", fl.strided(5) & (fl.causal() | fl.random_keys(4)), 40)
    yield Case("stride without a stride", fl.strided(3) - fl.strided(6), 90)
    yield Case("dilated windows and lighthouses", fl.window(4, dilation=3) | fl.window(5) | fl.global_tokens([0, 31]), 120)
    yield Case("clusters and a window", fl.clusters(table(30, 2, 96, high=5)) | fl.window(6), 96)
    yield Case("two clusterings", fl.clusters(table(31, 80, low=-1, high=4)) | fl.clusters(table(32, 80, high=7)), 80)
    yield Case("clusters within clusters", fl.clusters(table(33, 80, high=3)) & fl.clusters(table(34, 80, high=3)), 80)
    yield Case("clusters of a stride", fl.clusters(table(35, 90, high=3)) & fl.strided(2), 90)
    yield Case("everything but a window", ~fl.window(10), 77)
    yield Case("the future", ~fl.causal(), 70)
    yield Case(
        "exclusive or", (fl.window(20) - fl.blocked_window(0, block=16)) | (fl.blocked_window(0, block=16) - fl.window(20)), 100
    )
    yield Case("not a stride, nearby", fl.window(30) - fl.strided(3), 100)
    yield Case(
        "a deep expression", ~(~(fl.window(9) | fl.strided(5)) | ~(fl.causal() | fl.random_keys(4))) - fl.landmarks(7), 96
    )
    yield Case("chosen keys and random keys", fl.chosen_keys(table(36, 64, 4, low=-1, high=64)) | fl.random_keys(3), 64)
    yield Case(
        "chosen blocks, causal, and a window",
        (fl.chosen_blocks(table(37, 1, 2, 6, 2, high=6), block=16) & fl.causal()) | fl.window(4, 0),
        96,
    )
    yield Case(
        "packed documents with sinks",
        fl.documents(lengths=[60, 60]) & fl.causal() & (fl.window(7, 0) | fl.seen_by_all([0, 60])),
        120,
    )
    yield Case(
        "padding of everything", fl.padding([70, 31]) & (fl.window(9) | fl.global_tokens([0]) | fl.random_keys(2)), 70, batch=2
    )
    yield Case("nothing at all", fl.causal() - fl.full(), 40)
    yield Case("nothing, by padding", fl.padding([0, 0]), 33, batch=2)
    yield Case("every other row empty", fl.strided(2, phase=0) & fl.window(6), 75)
    yield Case("one item empty", fl.window(4) & fl.padding([0, 40]), 40, batch=2)


def _presets() -> Iterator[Case]:
    """Presets of papers."""
    yield Case("Longformer", presets.longformer(32, (0, 77)), 150)
    yield Case("Longformer, dilated, autoregressive", presets.longformer(16, dilation=3, autoregressive=True), 150)
    yield Case("BigBird", presets.bigbird(16, 2), 200)
    yield Case("BigBird, ragged", presets.bigbird(16, 3, seed=5), 123, heads=3)
    yield Case("ETC", presets.etc(9, 5), 99)
    yield Case("Sparse Transformer, strided", presets.sparse_transformer(12), 150)
    yield Case("Sparse Transformer, fixed", presets.sparse_transformer(16, "fixed", 3), 150)
    yield Case("LongNet", presets.longnet([16, 64, 256], [1, 2, 4]), 200, heads=4)
    yield Case("StreamingLLM", presets.streaming(4, 24), 140)
    yield Case("StreamingLLM, last query", presets.streaming(4, 24), 1, 140)
    yield Case("star", presets.star(), 70)
    yield Case("LogSparse", presets.logsparse(), 130)


def _tensors() -> Iterator[Case]:
    """Properties other than the pattern: head dimensions, also of v, grouped heads, strides, dropout, scale."""
    skim = fl.window(6) | fl.global_tokens([0]) | fl.random_keys(2)
    for dim in (1, 3, 7, 33, 40, 64, 72, 80, 96, 127, 128):
        yield Case(f"head_dim {dim}", skim, 67, head_dim=dim, heads=1)
    yield Case("grouped heads", skim, 70, heads=4, kv_heads=2)
    yield Case("grouped heads, three to one", fl.per_head([fl.window(w) for w in range(6)]), 50, heads=6, kv_heads=2, batch=2)
    yield Case("one key head", skim, 70, 90, heads=3, kv_heads=1, batch=2)
    yield Case("one key head, clusters", fl.clusters(table(40, 2, 4, 66, high=4)), 66, heads=4, kv_heads=1, batch=2)
    yield Case("v narrower than k", skim, 70, 90, head_dim=24, value_dim=16)
    yield Case("v wider than k, grouped heads", skim, 67, heads=4, kv_heads=2, batch=2, head_dim=8, value_dim=20, dropout=0.2)
    yield Case("v narrower, two pieces", fl.strided(4) | fl.window(6), 100, head_dim=40, value_dim=33, layout="every other")
    layouts: tuple[Layout, ...] = ("tokens first", "every other", "packed", "backwards", "repeated")
    for layout in layouts:
        yield Case(f"strides, {layout}", skim, 65, batch=2, heads=3, layout=layout)
    yield Case("strides, grouped heads", fl.strided(3) | fl.window(2), 50, heads=4, kv_heads=2, batch=2, layout="every other")
    yield Case("dropout", skim, 80, dropout=0.1, batch=2)
    yield Case("dropout of half, full", fl.full(), 70, dropout=0.5)
    yield Case("dropout, grouped heads", skim, 70, 90, dropout=0.3, heads=4, kv_heads=2)
    yield Case("dropout, clusters", fl.clusters(table(41, 2, 90, high=4)), 90, dropout=0.25)
    yield Case("dropout, dilated, rows before the text", fl.window(4, dilation=2), 60, 44, dropout=0.2)
    yield Case("dropout, long row", fl.sees_all([-1]) | fl.window(2), 2, 17_001, head_dim=8, heads=1, dropout=0.1)
    yield Case("scale zero", skim, 66, scale=0.0)
    yield Case("scale, given", skim, 66, scale=0.7)
    yield Case("scale, negative", skim, 66, scale=-0.4)
    yield Case("scale, sharp", fl.causal(), 100, scale=2.0, head_dim=32)
    yield Case("many heads and items", fl.window(3), 17, batch=5, heads=7)


CASES: tuple[Case, ...] = (
    *_sizes(),
    *_positional(),
    *_tokens(),
    *_random(),
    *_content(),
    *_combined(),
    *_presets(),
    *_tensors(),
)


def case(name: str) -> Case:
    """The case of this name."""
    return next(case for case in CASES if case.name == name)
