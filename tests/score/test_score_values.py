"""The values of `fl.score`: sums, equality, JSON, pickle; and the texts of refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from score_formula import BUCKETS, FARTHEST, bucket

import farlight as fl
from farlight.score.lowered import t5_buckets

S = fl.score


def full() -> fl.score.Score:
    table = torch.randn(8, 2, dtype=torch.bfloat16)
    biases = S.alibi([0.5, 0.25]) + S.relative(torch.randn(2, 5)) + S.t5(table, 8, 20, False) + S.key_bias(torch.randn(1, 2, 9))
    return S.softcap(30) + biases


def test_sums_keep_their_order_and_their_tensors() -> None:
    slopes = torch.nn.Parameter(torch.rand(2))
    score = S.softcap(2.0) + S.alibi(slopes)
    assert score.tensors == (slopes,)
    assert score.tensors[0] is slopes
    assert repr(score).startswith("softcap(2.0) + alibi(a (2,) float32 tensor [")


def test_copies_are_equal() -> None:
    score = full()
    for other in (S.Score.from_json(score.to_json()), pickle.loads(pickle.dumps(score)), copy.deepcopy(score)):
        assert other == score
        assert hash(other) == hash(score)
        assert [x.dtype for x in other.tensors] == [x.dtype for x in score.tensors]
    assert score != S.softcap(30)
    assert S.alibi([0.5]) != S.alibi([0.25])
    assert S.softcap(30) != "softcap(30.0)"


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_t5(bidirectional: bool) -> None:
    distances = range(-60, 61)
    wanted = [bucket(d, bidirectional) for d in distances]
    assert t5_buckets(torch.tensor(distances), BUCKETS, FARTHEST, bidirectional).tolist() == wanted


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: S.alibi([0.5]) + S.softcap(3.0), "softcap stands behind a bias"),
        (lambda: S.softcap(3.0) + S.softcap(3.0), "capped twice"),
        (lambda: S.softcap(0.0), "the cap is a finite number above 0"),
        (lambda: S.softcap(float("inf")), "the cap is a finite number above 0"),
        (lambda: S.alibi(torch.ones(2, 2)), "a floating-point tensor of 1 dimension is needed"),
        (lambda: S.alibi("steep"), "pass a tensor of floating-point numbers"),
        (lambda: S.relative(torch.ones(2, 4)), r"it is \(H, 2R \+ 1\)"),
        (lambda: S.t5(torch.ones(16, 2)), r"it is \(buckets, H\), with buckets=32"),
        (lambda: S.t5(torch.ones(32, 2), max_distance=8), "leave no logarithmic bucket"),
        (lambda: S.t5(torch.ones(32, 2), buckets=32.0), "pass a whole number"),
        (lambda: S.key_bias(torch.ones(5, dtype=torch.int64)), "of 3 dimensions is needed"),
        (lambda: S.Score.from_json("[]"), "not a score of format 1"),
        (lambda: S.Score.from_json('{"farlight.score": 1, "terms": []}'), "has no terms"),
        (lambda: S.Score.from_json('{"farlight.score": 1, "terms": [{"term": "eval"}]}'), "not a term of a score"),
        (
            lambda: S.Score.from_json('{"farlight.score": 1, "terms": [{"term": "alibi", "slopes": {"dtype": "x"}}]}'),
            "not a tensor",
        ),
    ],
)
def test_refusals_of_values(make, text: str) -> None:
    with pytest.raises(fl.ArgumentError, match=text):
        make()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"score": "alibi"}, "score is str; pass a value of fl.score"),
        ({"score": S.alibi([0.5])}, r"alibi: slopes has shape \(1,\); for these q, k and v it must be \(H,\) = \(2,\)"),
        ({"score": S.relative(torch.ones(3, 5))}, "relative: table has shape"),
        ({"score": S.t5(torch.ones(32, 3))}, "t5: table has shape"),
        ({"score": S.key_bias(torch.ones(1, 1, 8))}, r"key_bias has shape \(1, 1, 8\)"),
        (
            {"score": S.key_bias(torch.tensor([[[0.0, -torch.inf] * 5]]))},
            "5 of 10 numbers are not finite",
        ),
        ({"score": S.alibi(torch.ones(2, device="meta"))}, "the tensor is on meta, q on cpu"),
        ({"sinks": torch.ones(3)}, r"sinks has shape \(3,\)"),
        ({"sinks": [0.0, 0.0]}, "sinks is list"),
    ],
)
def test_refusals_of_attention(options, text: str) -> None:
    q = torch.randn(1, 2, 10, 4)
    with pytest.raises(fl.ArgumentError, match=text):
        fl.attention(q, q, q, fl.full(), **options)


def test_a_backend_that_cannot_says_which_term() -> None:
    q = torch.randn(1, 2, 10, 4)
    with pytest.raises(fl.UnsupportedError, match="backend 'dense' cannot .* it does not compute softcap"):
        fl.attention(q, q, q, fl.full(), score=S.softcap(3.0), backend="dense")
    assert "  dense: cannot: it does not compute softcap" in fl.explain(q, q, q, fl.full(), score=S.softcap(3.0))
