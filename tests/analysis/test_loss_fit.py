"""Fits by predicted loss: the prediction against the divergence of predictions, its shares and links, budgets, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit_model import encoder
from test_language import gemma, ids, llama, own_losses

import farlight as fl
from farlight.analysis.fit import loss_fit
from farlight.analysis.fit.loss_fit import loss_expressions, profile_loss
from farlight.analysis.loss import language
from farlight.errors import FarlightError
from farlight.hf import use_pattern

NEAR = "window(6, 0)"
CANDIDATES = [NEAR, "topblocks(share=0.3, block=2, causal=True) | window(6, 0)", "topkeys(4, causal=True)", "full()"]


def own_loss_under(model: Any, text: torch.Tensor, patterns: Any) -> float:
    """What the model's own logits lose under the patterns, nats per judged token."""
    full = own_losses(model, text)
    with use_pattern(model, patterns):
        return float((own_losses(model, text) - full).mean())


@pytest.mark.parametrize("logits", [1 << 25, 250], ids=["all logits at once", "of 5 tokens at a time"])
def test_the_prediction_is_the_divergence_of_a_small_change(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one head loses one key: nothing is approximated but the second order, and the draws are many."""
    model, text = llama(num_hidden_layers=1), ids(1, 24)
    monkeypatch.setattr(language, "_MAX_LOGITS", logits)
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].numel() // 32))
    mask = torch.ones(4, 24, 24, dtype=torch.bool)
    mask[2, 20, 7] = False
    pattern = fl.pairs(mask)
    table = profile_loss(model, text.expand(60, -1), [repr(pattern)]).measured[0][0]
    assert max(rows) == min(12, logits // 50)
    with torch.no_grad():
        full = model(text).logits[0, 11:-1].double().log_softmax(-1)
        with use_pattern(model, pattern):
            sparse = model(text).logits[0, 11:-1].double().log_softmax(-1)
    divergence = float((full.exp() * (full - sparse)).sum()) / 12
    assert divergence > 0
    assert table[2, [0, 1, 3]].tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert float(table[2, 2]) == pytest.approx(divergence, rel=0.3)
    assert table[0].tolist() == pytest.approx([300, 300, 299, 300])


def test_shares_and_links_are_those_of_the_retention() -> None:
    model, text = llama(), ids(2, 40)
    profile = profile_loss(model, text, CANDIDATES)
    calls: list[Any] = []
    with torch.no_grad(), use_pattern(model, None, observer=calls.append):
        model(text, use_cache=False)
    for number, call in enumerate(calls):
        for index, expression in enumerate(CANDIDATES):
            router = fl.routing.read_router(expression)
            kept = fl.retention(call.q, call.k, router(call.q, call.k), call.v, base=call.own)
            links, share, nats = profile.measured[number][index]
            assert links.tolist() == pytest.approx(kept.links.double().mean(0).tolist())
            assert share.tolist() == pytest.approx(kept.kept.double().mean((0, 2)).tolist(), abs=1e-5)
            assert bool((nats >= 0).all())
            assert bool((nats < 1e-9).all()) == (expression == "full()")
    assert all(bool((links == 820).all()) for links in profile.base_links.values())


def test_the_models_own_terms_on_the_scores_are_computed() -> None:
    """A capped score changes what a candidate costs."""
    model, text = gemma(softcap=0.5), ids(1, 40)
    profile = profile_loss(model, text, CANDIDATES)
    calls: list[Any] = []
    with torch.no_grad(), use_pattern(model, None, observer=calls.append):
        model(text, use_cache=False)
    for number, call in enumerate(calls):
        assert call.score == fl.score.softcap(0.5)
        full, near = (
            fl.attention(call.q, call.k, call.v, pattern, scale=call.scale, score=call.score, return_lse=True)[1]
            for pattern in (call.own, fl.parse(NEAR) & call.own)
        )
        kept = (near - full).double().exp().mean((0, 2))
        assert profile.measured[number][0, 1].tolist() == pytest.approx(kept.tolist(), abs=1e-6)


def test_capped_logits_are_seen_by_the_gradients() -> None:
    """The head alone would give other predictions than a model that caps its logits: all of them are then the model's own."""
    model, text = gemma(), ids(1, 24)
    calls = loss_fit._calls_with_gradients(language.LanguageReader(model), text, 0)
    captured: list[torch.Tensor] = []

    def observe(call: Any) -> Any:
        return lambda out: captured.append(out.requires_grad_() if not out.requires_grad else out)

    model.requires_grad_(False)
    with use_pattern(model, None, observer=observe):
        logits = model(text, use_cache=False).logits[0, 11:-1]
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"), captured)
    for number, gradient in enumerate(wanted):
        torch.testing.assert_close(calls[number][1], gradient)


def test_a_budget_is_spent_where_the_loss_is(tmp_path: Path) -> None:
    model = llama()
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    fit = fl.hf.fit(model, ids(4, 40), density=0.6, by="loss", candidates=CANDIDATES)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert fit.density <= 0.6 + 1e-9
    assert fit.loss is not None
    assert fit.loss.uniform is not None
    assert 0 < fit.loss.predicted <= fit.loss.uniform
    assert fit.held_out is not None
    assert fit.held_out.language is not None
    assert f"held out: {fit.held_out.language.lost:+.4f} nats" in str(fit)
    assert fit.to_dict()["held_out"]["loss"] == fit.held_out.language.loss
    stored = json.loads(fit.save(tmp_path / "fit.json"))["model"]
    assert fl.hf.read_layers(tmp_path / "fit.json").keys() == fit.layers.keys()
    assert stored["measure"] == "loss"
    assert stored["passages"] == [2, 2]
    assert stored["predicted_nats"] == fit.loss.predicted
    assert stored["uniform"] == fit.loss.uniform_expression
    assert stored["held_out_lost_nats"] == fit.held_out.language.lost
    assert stored["held_out_lost_interval"] == list(fit.held_out.language.interval or ())
    assert stored["lost_nats"] == pytest.approx(own_loss_under(model, ids(4, 40)[:2], fit.patterns), abs=1e-5)
    everything = fl.hf.fit(model, ids(4, 40), density=1.0, by="loss", candidates=CANDIDATES)
    assert everything.loss is not None
    assert everything.loss.predicted < 1e-9
    assert everything.trained.language is not None
    assert abs(everything.trained.language.lost) < 1e-5


def test_a_language_model_is_fitted_by_loss_unless_told() -> None:
    model = llama()
    fitted = fl.hf.fit(model, ids(2, 48), density=0.95)
    assert fitted.loss is not None
    assert {head if isinstance(head, str) else repr(head) for head in fitted.layers[0].heads} <= set(loss_expressions(None))
    assert fl.hf.fit(model, ids(2, 40), density=0.5, candidates=["window"]).loss is None
    assert fl.hf.fit(model, ids(2, 40), keep=0.9, candidates=["window"]).loss is None


@pytest.mark.parametrize(
    "options, text",
    [
        ({"by": "luck", "density": 0.5}, "by = 'luck' is unknown; use 'attention' or 'loss'"),
        ({"by": "loss", "keep": 0.5}, "by='loss' needs density or time"),
        ({"by": "loss", "density": 0.5, "even": True}, "by='loss' with even, weigh or gist"),
        ({"by": "loss", "density": 0.5, "candidates": ["offsets"]}, "candidates: 'offsets' with by='loss': candidates are run"),
        ({"by": "loss", "density": 0.5, "candidates": []}, "candidates is empty"),
        ({"by": "loss", "density": 0.01, "candidates": [NEAR]}, "links are allowed, but the cheapest candidates take"),
    ],
)
def test_bad_fits_by_loss_say_what_is_wrong(options: dict[str, Any], text: str) -> None:
    with pytest.raises(FarlightError) as raised:
        fl.hf.fit(llama(), ids(2, 40), **options)
    assert text in str(raised.value)


def test_a_model_without_a_head_has_no_loss() -> None:
    with pytest.raises(fl.UnsupportedError, match="BertModel has no language head, so there is no loss to fit to"):
        fl.hf.fit(encoder(), ids(2, 40), density=0.5, by="loss", candidates=[NEAR])
