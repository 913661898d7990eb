"""Patterns of what others have: masks of every sense, edges, sparse matrices, graphs, mask functions, block masks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.patterns.intervals import intervals
from farlight.testing.cases import bits

MASK = bits(1, 30, 40, share=0.3)
INF = float("-inf")


def same(pattern: fl.Pattern, mask: Tensor) -> None:
    """The pattern's set, by its definition, by its plan, and by attention, is that of the mask `(B|1, H|1, n_q, n_k)`."""
    batch, heads, n_q, n_k = mask.shape
    assert torch.equal(pattern.dense(n_q, n_k, batch=batch, heads=heads).expand(mask.shape), mask)
    assert torch.equal(fl.plan(pattern, n_q, n_k, batch=batch, heads=heads).dense().expand(mask.shape), mask)
    assert fl.Pattern.from_json(pattern.to_json()) == pattern == fl.parse(repr(pattern))
    q, k = torch.randn(batch, heads, n_q, 8), torch.randn(batch, heads, n_k, 8)
    torch.testing.assert_close(
        fl.attention(q, k, k, pattern), fl.attention(q, k, k, fl.pairs(mask), backend="reference"), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(30, 40), (2, 30, 40), (3, 1, 30, 40)], ids=str)
def test_dense_masks_of_every_sense(shape: tuple[int, ...]) -> None:
    mask = bits(2, *shape, share=0.4)
    additive = torch.where(mask, 0.0, INF)
    lowest = torch.where(mask, 0.0, torch.finfo(torch.bfloat16).min).bfloat16()
    for pattern in (
        fl.from_dense(mask),
        fl.from_dense(~mask, allowed=False),
        fl.from_dense(additive),
        fl.from_dense(additive.half()),
        fl.from_dense(lowest),
        fl.from_dense(mask.int(), allowed=1),
        fl.from_dense((~mask).float(), allowed=0),
        fl.from_dense(mask.numpy()),
        fl.from_dense(additive.tolist()),
    ):
        assert pattern == fl.pairs(mask)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fl.from_dense(MASK.int()), "does not say which is allowed; pass allowed=1 or allowed=0"),
        (lambda: fl.from_dense(MASK.float()), "0.0 and 1.0 does not say which is allowed"),
        (lambda: fl.from_dense(torch.randn(3, 3)), "a bias on the scores, which no pattern can hold; see fl.score"),
        (lambda: fl.from_dense(MASK.int() * 2, allowed=1), "for masks of 0 and 1, and this one has other values"),
        (lambda: fl.from_dense(MASK, allowed=2), "say which value is allowed, 0 or 1"),
        (lambda: fl.from_dense(MASK.to_sparse()), "pass it to fl.from_sparse"),
        (lambda: fl.from_dense(fl.causal()), "is a pattern already"),
        (lambda: fl.from_dense("mask"), "bool tensor is needed|cannot be read"),
        (lambda: fl.from_edges([0, 3], [0, 0], 3), "rows has 3, which is not one of the 3 positions"),
        (lambda: fl.from_edges([0, 1], [0, -1], 3), "cols has -1"),
        (lambda: fl.from_edges([0, 1], [0], 3), "2 rows and 1 cols"),
        (lambda: fl.from_edges([0.5], [0], 3), "give whole numbers"),
        (lambda: fl.from_edges([0], [0], "3"), "give the number of tokens, or"),
        (lambda: fl.from_sparse(MASK), "is no sparse matrix of torch or scipy; dense masks: fl.from_dense"),
        (lambda: fl.from_sparse(bits(1, 2, 3, 3).to_sparse()), r"a matrix of shape \(2, 3, 3\)"),
        (lambda: fl.from_graph([(0, 1)]), "is not a networkx graph"),
        (lambda: fl.from_mask_mod(lambda b, h, i, j: i - j, 3, 3), "it must return a bool tensor, with & | ~"),
        (lambda: fl.from_block_mask(MASK), "is not a BlockMask"),
        (lambda: intervals([[0, 2]], [[0, 2], [1, 3]], 3).dense(1, 3), "sorted, disjoint and within the keys"),
        (lambda: intervals([[0, 2]], [[0, 2]], 3).dense(1, 3), "sorted, disjoint and within the keys"),
        (lambda: intervals([[0, 2, 1]], [[0, 2]], 3), r"give \(B, H, N, 2\) and \(M, 2\)"),
        (lambda: fl.from_edges([0], [0], 3).dense(3, 4), "they are over 3 keys, but there are 4; they must agree"),
        (lambda: fl.from_edges(["a"], [0], 3), r"rows = \['a'\]; give a list of whole numbers"),
    ],
)
def test_refusals(call: Callable[[], object], says: str) -> None:
    with pytest.raises(fl.PatternError, match=says):
        call()


def test_edges_in_any_order_and_repeated() -> None:
    rows, cols = MASK.nonzero(as_tuple=True)
    order = torch.randperm(2 * rows.numel(), generator=torch.Generator().manual_seed(0))
    twice = torch.cat((rows, rows))[order], torch.cat((cols, cols))[order]
    pattern = fl.from_edges(*twice, (30, 40))
    same(pattern, MASK[None, None])
    assert pattern == fl.from_edges(rows.tolist(), cols.numpy(), (30, 40))
    assert fl.from_edges([], [], 5).count(5) == 0
    hub = fl.from_edges([0] * 1000 + list(range(1000)), list(range(1000)) + [0] * 1000, 1000)
    assert sum(x.numel() for x in hub.tables) < 4 * 1000 + 4  # a row that sees all is one interval
    assert hub == fl.from_edges(*fl.global_tokens([0]).dense(1000)[0, 0].nonzero(as_tuple=True), 1000)


def test_edges_with_queries_at_the_end_and_other_patterns() -> None:
    square = bits(3, 40, 40, share=0.2)
    pattern = fl.from_edges(*square.nonzero(as_tuple=True), 40)
    assert torch.equal(pattern.dense(7, 40)[0, 0], square[33:])
    both = (pattern | fl.window(1)) & fl.causal() - fl.strided(5)
    wanted = (square | fl.window(1).dense(40)[0, 0]) & fl.causal().dense(40)[0, 0] & ~fl.strided(5).dense(40)[0, 0]
    assert torch.equal(fl.plan(both, 40).dense()[0, 0], wanted)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:Sparse CSC tensor support")
def test_sparse_matrices() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    for form in ("csr_matrix", "csc_array", "coo_array", "lil_matrix", "dok_array"):
        same(fl.from_sparse(getattr(sparse, form)(MASK.int().numpy())), MASK[None, None])
    stored_zero = sparse.csr_array((np.array([1.0, 0.0]), (np.array([0, 1]), np.array([1, 0]))), shape=(2, 2))
    assert fl.from_sparse(stored_zero).count(2) == 1
    cancelling = sparse.coo_array((np.array([1.0, -1.0]), (np.array([0, 0]), np.array([1, 1]))), shape=(2, 2))
    assert fl.from_sparse(cancelling).count(2) == 0
    for made in (MASK.to_sparse(), MASK.float().to_sparse_csr(), MASK.double().to_sparse_csc()):
        assert torch.equal(fl.from_sparse(made).dense(30, 40), MASK[None, None])


def test_graphs() -> None:
    nx = pytest.importorskip("networkx")
    ring = nx.cycle_graph(9)
    assert fl.from_graph(ring) | fl.window(0) == fl.from_graph(ring) | fl.window(0)
    assert torch.equal(fl.from_graph(ring).dense(9)[0, 0].int(), torch.from_numpy(nx.to_numpy_array(ring)).int())
    directed = nx.DiGraph([("b", "a"), ("c", "b"), ("c", "c")])
    wanted = torch.from_numpy(nx.to_numpy_array(directed, nodelist=["a", "b", "c"])).bool()
    assert torch.equal(fl.from_graph(directed, ["a", "b", "c"]).dense(3)[0, 0], wanted)
    assert fl.from_graph(nx.empty_graph(4)).count(4) == 0
    with pytest.raises(fl.PatternError, match="lists 2 nodes, the graph has 3"):
        fl.from_graph(directed, ["a", "b"])


def test_mask_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farlight.patterns.converters._PAIRS", 500)
    table = bits(5, 2, 3, 30, 40, share=0.3)
    same(fl.from_mask_mod(lambda b, h, i, j: table[b, h, i, j], 30, 40, batch=2, heads=3), table)
    ids = torch.tensor([0] * 10 + [1] * 20)
    same(
        fl.from_mask_mod(lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j), 30, 30), (fl.documents(ids) & fl.causal()).dense(30)
    )
    assert fl.from_mask_mod(lambda b, h, i, j: i == j, 0, 5).dense(0, 5).shape == (1, 1, 0, 5)


@pytest.mark.parametrize("n", [(256, 256), (100, 300), (300, 130)], ids=str)
def test_block_masks(n: tuple[int, int]) -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    table = bits(6, 2, 3, *n, share=0.5)
    table[:, :, :, 128:] = True  # full blocks
    table[1, 0, :, :128] = False
    mask = flex.create_block_mask(lambda b, h, i, j: table[b, h, i, j], 2, 3, *n, device="cpu")
    same(fl.from_block_mask(mask), table)
    causal = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 300, 300, device="cpu")
    assert torch.equal(fl.from_block_mask(causal).dense(300), fl.causal().dense(300))


def test_attention_names_the_converter() -> None:
    q = torch.randn(1, 1, 4, 8)
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    block_mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 4, 4, device="cpu")
    for value, name in (
        (MASK, r"fl.from_dense\(mask\), of links by fl.from_edges\(rows, cols, n\)"),
        (MASK.numpy(), r"fl.from_dense\(mask\)"),
        (MASK.to_sparse(), r"fl.from_sparse\(matrix\)"),
        (lambda b, h, i, j: i >= j, r"fl.from_mask_mod\(fn, n_q, n_k\)"),
        (block_mask, r"fl.from_block_mask\(mask\)"),
        ("causal", r"pass a pattern such as fl.window\(256\)"),
    ):
        with pytest.raises(fl.ArgumentError, match=name):
            fl.attention(q, q, q, value)  # type: ignore[call-overload]


def test_a_converted_pattern_is_compiled_and_batched() -> None:
    pattern = fl.from_edges(*MASK[:30, :30].nonzero(as_tuple=True), 30)
    q = torch.randn(2, 1, 2, 30, 8)
    wanted = torch.stack([fl.attention(x, x, x, pattern) for x in q])
    torch.testing.assert_close(torch.vmap(lambda x: fl.attention(x, x, x, pattern))(q), wanted)
    compiled = torch.compile(lambda x: fl.attention(x, x, x, pattern), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q[0]), wanted[0])


@pytest.mark.parametrize("module", ["", "distributed", "hf", "presets", "routing", "nn", "score"])
def test_dir_shows_the_public_names(module: str) -> None:
    face = getattr(fl, module) if module else fl
    # SparseCache needs transformers, so that import * leaves it out.
    optional = {"hf": ["SparseCache"], "": ["__version__"]}.get(module, [])
    assert dir(face) == sorted([*face.__all__, *optional])
    assert all(hasattr(face, name) for name in dir(face))


def test_an_explanation_is_text_and_a_value() -> None:
    q = torch.randn(1, 1, 64, 8)
    found = fl.explain(q, q, q, fl.window(4), return_lse=True)
    assert isinstance(found, str)
    assert repr(found) == str(found)
    assert f"auto takes {found.backend!r}" in found
    assert found.refusals["dense"]
    assert not found.refusals["torch"]
    assert found.full.pairs == 64 * 64
    assert found.speedup == found.full.seconds / found.sparse.seconds
