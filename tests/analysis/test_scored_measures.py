"""Retention, fits and the measures of models under score terms and sinks, against a dense float64 softmax written here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.analysis.fit import profile as fit_profile
from farlight.analysis.loss import probabilities
from farlight.analysis.loss.fidelity import measure_fidelity
from farlight.analysis.loss.heavy_keys import heavy_keys
from farlight.hf.interface import use_pattern
from farlight.routing import TopKeys
from farlight.score import Score

B, H, KV, N, D = 2, 4, 2, 37, 8
PATTERN, BASE = fl.window(5) | fl.random_keys(2) | fl.global_tokens([0]), fl.causal()


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """q, k, v, sinks and the tensors of the terms."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    terms = {"slopes": draw(H).abs() / 4, "table": draw(H, 9), "t5": draw(8, H), "bias": draw(B, H, N)}
    return draw(B, H, N, D) * 2, draw(B, KV, N, D), draw(B, KV, N, 5), draw(H) + 1, terms


def scores(names: tuple[str, ...], terms: dict[str, Tensor]) -> Score | None:
    makers = {
        "cap": lambda: fl.score.softcap(1.5),
        "slopes": lambda: fl.score.alibi(terms["slopes"]),
        "table": lambda: fl.score.relative(terms["table"]),
        "bias": lambda: fl.score.key_bias(terms["bias"]),
    }
    made = [make() for name, make in makers.items() if name in names]
    return sum(made[1:], made[0]) if made else None


def dense(q: Tensor, k: Tensor, names: tuple[str, ...], terms: dict[str, Tensor], sinks: Tensor | None) -> Tensor:
    """`(B, H, N, N + 1)`: full probabilities under the base; the last column is the sink's share, 0 without sinks."""
    s = q @ k.repeat_interleave(H // KV, 1).mT * D**-0.5
    if "cap" in names:
        s = 1.5 * torch.tanh(s / 1.5)
    j, i = torch.arange(N), torch.arange(N)[:, None]
    if "slopes" in names:
        s = s - terms["slopes"][:, None, None] * (j - i).abs()
    if "table" in names:
        s = s + terms["table"][:, (j - i).clamp(-4, 4) + 4]
    if "bias" in names:
        s = s + terms["bias"][:, :, None]
    s = s.masked_fill(~BASE.dense(N), -torch.inf)
    last = torch.full((H,), -torch.inf) if sinks is None else sinks
    return torch.cat((s, last[:, None, None].expand(B, H, N, 1)), -1).softmax(-1)


CHOICES = [
    (("cap",), False),
    (("slopes",), True),
    (("table",), False),
    (("bias",), True),
    ((), True),
    (("cap", "slopes", "table", "bias"), True),
]


@pytest.mark.parametrize("tile", [1 << 20, 1 << 8], ids=["one tile", "many tiles"])
@pytest.mark.parametrize(("names", "with_sinks"), CHOICES)
def test_retention_is_that_of_the_formula(
    names: tuple[str, ...], with_sinks: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probabilities, "_TILE_SCORES", tile)
    q, k, v, sinks, terms = problem()
    logits = sinks if with_sinks else None
    p = dense(q, k, names, terms, logits)
    given: dict[str, Any] = {"base": BASE, "score": scores(names, terms)} | ({"sinks": logits} if with_sinks else {})
    mask = (PATTERN & BASE).dense(N, heads=H)
    kept = (p[..., :N] * mask).sum(-1) + p[..., N]
    values = v.repeat_interleave(H // KV, 1)
    full = p[..., :N] @ values
    sparse = (p[..., :N] * mask) @ values / kept[..., None]
    for with_v in (True, False):
        found = fl.retention(q, k, PATTERN, v if with_v else None, lost=3, **given)
        torch.testing.assert_close(found.kept, kept)
        beyond = ((p * torch.cat((mask, mask[..., :1]), -1))[..., 1:N].sum((-1, -2))) / p[..., 1:N].sum((-1, -2))
        torch.testing.assert_close(found.mass_without_sink, beyond)
        for item in range(B):
            for head in range(H):
                best = p[item, head, :, :N].flatten().sort(descending=True).values[: int(found.links[item, head])].sum()
                wanted = float(best + p[item, head, :, N].sum()) / N
                assert -1e-6 <= wanted - float(found.best[item, head]) <= float(found.best_slack[item, head]) + 1e-6
        torch.testing.assert_close(found.frontier()[1][..., -1], torch.ones(B, H, dtype=torch.float64))
        if with_v:
            assert found.error is not None
            assert found.lost_output is not None
            norm = full.square().sum((-1, -2)).sqrt()
            torch.testing.assert_close(found.error, (sparse - full).square().sum((-1, -2)).sqrt() / norm)
            lost = (p[..., :N] * ~mask) @ values
            torch.testing.assert_close(found.lost_output, lost.square().sum((-1, -2)).sqrt() / norm)
        heaviest = (p[..., :N] * ~mask).flatten().topk(3).values
        assert found.lost is not None
        torch.testing.assert_close(found.lost.probability.double().sort(descending=True).values, heaviest)


@pytest.mark.parametrize("longest", [1024, 16], ids=["by pair", "by distance"])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(
    "candidates", [None, ["pairs", "blocks"], ["window(3) | seen_by_all([0])"]], ids=["grown", "cells", "given"]
)
def test_a_fit_keeps_what_it_says(candidates: Any, even: bool, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_profile, "MAX_DENSE_TOKENS", longest)
    q, k, _, sinks, terms = problem()
    names = ("cap", "slopes", "table", "bias")
    p = dense(q, k, names, terms, sinks)
    given: dict[str, Any] = {"base": BASE, "score": scores(names, terms), "sinks": sinks}
    target: dict[str, Any] = {"density": 0.4, "even": True} if even else {"density": 0.4}
    found = fl.fit(q, k, candidates=candidates, **target, **given)
    for head, pattern in enumerate(found.heads):
        assert isinstance(pattern, fl.Pattern)
        mask = (pattern & BASE).dense(N)
        kept = ((p[:, head, :, :N] * mask).sum(-1) + p[:, head, :, N]).mean()
        assert float(found.kept[head]) == pytest.approx(float(kept), abs=1e-5)
        assert float(found.kept[head]) > float(p[:, head, :, N].mean()) + 0.05
    if candidates is None and not even:
        assert fl.fit(q, k, keep=0.99, **given).mass >= 0.99  # of which the sinks take a part


def test_the_measures_of_a_model_compute_its_terms() -> None:
    """A model with a softcap and one with sinks: shares, weights and fits agree with the lse of its own attention."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "intermediate_size": 32,
    }  # fmt: skip
    gemma = transformers.Gemma2Config(**sizes, attn_logit_softcapping=0.5, initializer_range=0.5)
    oss = transformers.GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1, initializer_range=0.5)
    for made in (transformers.Gemma2Model(gemma).eval(), transformers.GptOssModel(oss).eval()):
        text, near = torch.randint(0, 32, (2, 24)), fl.window(3)
        calls: list[Any] = []
        with torch.no_grad(), use_pattern(made, None, observer=calls.append):
            made(input_ids=text, use_cache=False)
        assert all((call.score is None) != (call.sinks is None) for call in calls)
        fidelity = measure_fidelity(made, text, [near]).patterns[0]
        for layer, call in enumerate(calls):
            full, part = (
                fl.attention(call.q, call.k, call.v, pattern, scale=call.scale, return_lse=True, **call.terms)[1]
                for pattern in (call.own, near & call.own)
            )
            kept = (part - full).double().exp()  # a row's share, its sink's among it
            torch.testing.assert_close(fidelity.mass[layer], kept.mean((0, 2)), atol=1e-5, rtol=1e-4)
        one = heavy_keys(made, text[0], [near], [(1, 2)])[0]
        torch.testing.assert_close(one.kept[0].double(), kept[0, 2], atol=1e-5, rtol=1e-4)
        fitted = fl.hf.fit(made, text, keep=0.97, by="attention")
        assert fitted.trained.mass.mean() >= 0.97 - 1e-6


@pytest.mark.parametrize("names", [("slopes",), ("cap", "slopes", "table", "bias")], ids="+".join)
def test_top_keys_rank_under_the_score(names: tuple[str, ...]) -> None:
    q, k, _, _, terms = problem()
    p = dense(q, k, names, terms, None)[..., :N]
    score = scores(names, terms)
    found = TopKeys(4, causal=True, score=score)(q, k).dense(N, batch=B, heads=H)
    wanted = torch.zeros_like(found).scatter(3, p.topk(4).indices, True) & BASE.dense(N)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, TopKeys(4, causal=True)(q, k).dense(N, batch=B, heads=H))
    kept = (p * TopKeys(mass=0.8, causal=True, score=score)(q, k).dense(N, batch=B, heads=H)).sum(-1)
    assert float(kept.min()) >= 0.8
    assert "score=alibi" in repr(TopKeys(4, score=fl.score.alibi([1.0])))


def test_terms_that_do_not_fit_are_refused() -> None:
    q, k, *_ = problem()
    with pytest.raises(fl.ArgumentError, match="alibi: slopes has shape"):
        fl.retention(q, k, PATTERN, score=fl.score.alibi(torch.ones(3)))
    with pytest.raises(fl.ArgumentError, match="alibi: slopes has shape"):
        TopKeys(2, score=fl.score.alibi(torch.ones(3)))(q, k)
    with pytest.raises(fl.ArgumentError, match="sinks has shape"):
        fl.fit(q, k, sinks=torch.ones(3, dtype=torch.float64))
