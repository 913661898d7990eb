"""The transposed tables hold the same pairs as the plan, listed by key block."""

import pytest
import torch

import farlight as fl
from farlight.patterns.expression import Sizes
from farlight.plan import TileShape, plan_for
from farlight.plan.validate import mask_of_run

N = 75
PATTERNS = [
    fl.window(9) | fl.global_tokens([0, -1]) | fl.random_keys(3),
    fl.presets.bigbird(8, 2),
    fl.presets.longformer(12, (0, 5, 40), dilation=3),
    fl.clusters(torch.randint(-1, 5, (2, 3, N), generator=torch.Generator().manual_seed(0))) | fl.window(2),
    fl.per_head([fl.strided(3) & ~fl.window(4), fl.random_keys(4, causal=True), fl.full()]),
    fl.clusters(torch.randint(0, 4, (1, 3, N), generator=torch.Generator().manual_seed(1))) & fl.pairs(torch.rand(N, N) < 0.05),
]


def dense_by_key_block(plan, block):
    """How often each pair is covered, from the transposed tables."""
    sizes, transposed = plan.sizes, plan.transposed(block)
    out = torch.zeros(sizes.batch, sizes.heads, sizes.n_q, sizes.n_k, dtype=torch.int64)
    for piece, layers in zip(plan.pieces, transposed.layers, strict=True):
        for layer, view in zip(piece.layers, layers, strict=True):
            for b in range(sizes.batch):
                for h in range(sizes.heads):
                    v, w = (int(t.expand(sizes.batch, sizes.heads)[b, h]) for t in (piece.variant, layer.variant))
                    first, last = int(piece.first[v]), int(piece.first[v + 1])
                    for c in range(view.blocks):
                        at = c + (w * view.blocks if layer.keys is None else 0)
                        for x in range(int(view.indptr[at]), int(view.indptr[at + 1])):
                            r, e = int(view.run[x]), int(view.tile[x]) - int(layer.entry_base[w]) + first
                            if not first <= e < last:
                                continue  # slots of another variant in the same block
                            lo, hi, count = int(layer.lo[r]), int(layer.hi[r]), int(piece.count[e])
                            seen = mask_of_run(plan, int(layer.mask[r]), lo, hi, count)
                            place = torch.arange(int(piece.start[e]), int(piece.start[e]) + count)
                            rows = place if piece.rows is None else piece.rows[place].long()
                            slots = torch.arange(max(lo, c * block), min(hi, (c + 1) * block))
                            keys = slots if layer.keys is None else layer.keys[slots].long()
                            out[b, h, rows[:, None], keys] += seen[:, slots - lo].long()
                    if view.point_indptr is not None:
                        at = w if piece.rows is None else v
                        for key in range(sizes.n_k):
                            pointer = view.point_indptr[at * sizes.n_k + key : at * sizes.n_k + key + 2]
                            place = view.point_place[int(pointer[0]) : int(pointer[1])].long()
                            out[b, h, place if piece.rows is None else piece.rows[place].long(), key] += 1
    return out


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
@pytest.mark.parametrize("shape", [TileShape(8, 4, 16), TileShape()], ids=["small", "default"])
def test_transposed_tables_hold_the_same_pairs(pattern, shape):
    plan = plan_for(pattern, Sizes.of(N, batch=2, heads=3), shape)
    for block in (1, 16, 64):
        covers = dense_by_key_block(plan, block)
        assert covers.max() <= 1
        assert torch.equal(covers.bool(), plan.dense())


def test_transposed_tables_are_cached():
    plan = fl.plan(fl.window(3), 50)
    assert plan.transposed(16) is plan.transposed(16)
    assert plan.transposed(16) is not plan.transposed(32)
