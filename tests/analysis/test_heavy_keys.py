"""The heaviest keys of chosen heads against the model's own attention probabilities, and what a page carries of them."""

from __future__ import annotations

import numpy as np
import pages
import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.analysis.loss.heavy_keys import EACH, FULL, heavy_keys
from farlight.analysis.passages import cut_passages
from farlight.errors import ArgumentError
from farlight.report.packing import unpack
from farlight.report.weights import _packed

ROUTER = fl.routing.TopBlocks(count=2, block=8)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return cut_passages(pages.text(), pages.tokenizer(), 48, 3).ids[1]


def test_rows_are_the_models_probabilities(ids: Tensor) -> None:
    """Full attention and the same scores over the keys of a pattern, of a layer's own pattern and of a router's choice."""
    subjects = [pages.PATTERNS[1], {0: fl.window(2), 2: fl.window(9)}, ROUTER]
    rows = heavy_keys(pages.model(), ids, subjects, [(2, 1), (0, 3)])
    model = pages.model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probability = torch.stack(model(ids[None], output_attentions=True).attentions)[:, 0]
    assert [(found.layer, found.head) for found in rows] == [(2, 1), (0, 3)]
    for found in rows:
        full = probability[found.layer, found.head]
        allowed = [pages.PATTERNS[1], subjects[1][found.layer]]  # type: ignore[index]
        for query in (0, 17, 47):
            want = full[query].sort(descending=True)
            listed = found.row(query)[:FULL]
            assert [key for key, _ in listed] == want.indices[:FULL].tolist()
            assert torch.tensor([weight for _, weight in listed]).allclose(want.values[:FULL], rtol=1e-4)
            for candidate, pattern in enumerate(allowed):
                mask = pattern.dense(48, heads=4)[0].expand(4, 48, 48)[found.head, query]
                kept = full[query][mask]
                assert found.kept[candidate, query].item() == pytest.approx(kept.sum().item(), rel=1e-4)
                under = torch.where(mask, full[query] / kept.sum(), 0.0).sort(descending=True)
                listed = found.row(query, candidate)[:EACH]
                assert [key for key, _ in listed] == under.indices[under.values > 0][:EACH].tolist()
                assert torch.tensor([weight for _, weight in listed]).allclose(under.values[: len(listed)], rtol=1e-4)
            seen = {key for key, _ in found.row(query, 2)}
            assert len({key // 8 for key in seen}) <= 2  # the blocks that the router chose


def test_weights_come_back_from_a_page(ids: Tensor) -> None:
    (found,) = heavy_keys(pages.model(), ids, pages.PATTERNS, [(1, 0)])
    packed = _packed(found)
    counts, steps = unpack(packed["counts"]), unpack(packed["steps"]).astype(np.int64)
    assert counts.tolist() == found.first.diff().tolist()
    keys = np.concatenate([np.cumsum(row) for row in np.split(steps, np.cumsum(counts)[:-1])])
    assert keys.tolist() == found.key.tolist()
    assert np.allclose(np.exp(unpack(packed["full"]) / -4096.0), found.probability, rtol=1.3e-4)
    bits = np.unpackbits(unpack(packed["allowed"][2]), bitorder="little")[: keys.size]
    assert bits.tolist() == found.allowed[2].int().tolist()


def test_what_also_attends_to_summaries_has_no_weights(ids: Tensor) -> None:
    (found,) = heavy_keys(pages.model(), ids, [fl.routing.Gist(fl.window(4), block=8), fl.window(4)], [(0, 0)])
    assert found.kept[0].isnan().all()
    assert _packed(found)["kept"][0] is None
    assert not found.kept[1].isnan().any()


def test_an_unknown_head_is_named(ids: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"layer 3, head 0: the model has layers 0 to 2 with 4 heads each, numbered from 0"):
        heavy_keys(pages.model(), ids, [fl.full()], [(0, 0), (3, 0)])
