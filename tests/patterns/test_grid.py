"""Neighborhoods, prefix language models, and block masks of plans; the pairs themselves are compared in test_patterns.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import farlight as fl
from farlight.testing import case

NAMES = ("causal", "skim", "per head", "padding of everything", "neighborhood of a picture", "causal, last queries", "no query")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fl.neighborhood((), 3), "shape has no axis"),
        (lambda: fl.neighborhood((4, 5), 5), "a window of 5 with dilation 1 needs 5 tokens, but the axis has 4"),
        (lambda: fl.neighborhood((4, 9), 3, (1, 4)), "a window of 3 with dilation 4 needs 12 tokens, but the axis has 9"),
        (lambda: fl.neighborhood((4, 5), (3, 3, 3)), "has 3 entries for 2 axes"),
        (lambda: fl.neighborhood((4, 5), 3, causal=1), "give True or False"),
        (lambda: fl.neighborhood((4, 5), 0), "window = 0"),
        (lambda: fl.neighborhood((4, 5), 3).dense(19), "has 20 tokens, but there are 19 keys"),
        (lambda: fl.neighborhood(7, 3), "give a list of axis lengths"),
    ],
)
def test_refusals(call: Callable[[], object], says: str) -> None:
    with pytest.raises(fl.PatternError, match=says):
        call()


def test_every_query_has_a_whole_window_and_the_text_is_short() -> None:
    pattern = fl.neighborhood((12, 9), (5, 3), dilation=(2, 3))
    assert (pattern.dense(108).sum(-1) == 15).all()
    assert repr(fl.neighborhood((4, 4), (3, 3), (1, 1), (False, False))) == "neighborhood([4, 4], 3)"
    assert repr(pattern) == "neighborhood([12, 9], [5, 3], dilation=[2, 3])"
    assert fl.neighborhood((7,), 3, causal=True).dense(7)[0, 0].equal(fl.window(2, 0).dense(7)[0, 0])


def test_prefix_lm_is_a_union() -> None:
    assert fl.prefix_lm([3, 5]) == fl.causal() | fl.padding([3, 5]) == fl.parse("prefix_lm([3, 5])")


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_as_a_block_mask(name: str) -> None:
    pytest.importorskip("torch.nn.attention.flex_attention")
    of = case(name)
    plan = fl.plan(of.pattern, of.n_q, of.n_k, batch=of.batch, heads=of.heads, q_offset=of.q_offset)
    mask = plan.to_block_mask(32)
    assert mask.seq_lengths == (of.n_q, of.n_k)
    b, h = torch.arange(of.batch).view(-1, 1, 1, 1), torch.arange(of.heads).view(1, -1, 1, 1)
    i, j = torch.arange(of.n_q).view(1, 1, -1, 1), torch.arange(of.n_k).view(1, 1, 1, -1)
    wanted = plan.dense().expand(of.batch, of.heads, of.n_q, of.n_k)
    assert torch.equal(mask.mask_mod(b, h, i, j).expand(wanted.shape), wanted)
    back = fl.from_block_mask(mask).dense(of.n_q, of.n_k, batch=of.batch, heads=of.heads, q_offset=0)
    assert torch.equal(back.expand(wanted.shape), wanted)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_under_the_block_mask() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    pattern = fl.window(20) | fl.global_tokens([0]) | fl.random_keys(2)
    q = torch.randn(1, 2, 256, 16)
    mask = fl.plan(pattern, 256, heads=2).to_block_mask()
    found = flex.flex_attention(q, q, q, block_mask=mask)
    torch.testing.assert_close(found, fl.attention(q, q, q, pattern), atol=1e-5, rtol=1e-5)
