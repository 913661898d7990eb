"""Fits within a share of full attention's seconds: what is timed, how the budget is spent, refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_audit import encoder, tokenizer, words
from test_language import ids, llama

import farlight as fl
from farlight.analysis.fit import head_seconds as timing
from farlight.analysis.fit.head_seconds import HeadSeconds
from farlight.analysis.fit.loss_fit import LossProfile, loss_expressions, profile_loss
from farlight.cli import main
from farlight.errors import FarlightError
from farlight.hf import use_pattern
from farlight.patterns import expression
from farlight.routing import read_router

NEAR, CHOSEN = "window(6, 0)", "topblocks(share=0.3, block=2, causal=True) | window(6, 0)"
CANDIDATES = [NEAR, CHOSEN, "full()"]


def profile(seconds: list[HeadSeconds]) -> LossProfile:
    """Two layers of three heads; each head loses other amounts under the candidates."""
    torch.manual_seed(0)
    links = torch.tensor([10.0, 20.0, 40.0]).double()[:, None].expand(3, 3)
    measured = {}
    for number in (0, 1):
        lost = torch.rand(3, 3, dtype=torch.float64) * torch.tensor([1.0, 0.3, 0.0]).double()[:, None]
        measured[number] = torch.stack([links, 1 - lost, lost], 1)
    return LossProfile(CANDIDATES, measured, dict.fromkeys((0, 1), links[2]), seconds)


def test_seconds_are_spent_where_the_loss_is() -> None:
    """Against every choice of candidates: within one step of one head of the best, and never over the budget."""
    seconds = [HeadSeconds(1.0, 1.0), HeadSeconds(3.0, 1.5), HeadSeconds(4.0, 4.0), HeadSeconds(4.0, 4.0)]
    made = profile(seconds)
    cost = {text: each.apart for text, each in zip(CANDIDATES, seconds, strict=False)}
    losses = [made.measured[layer][:, 2, head].tolist() for layer in (0, 1) for head in range(3)]
    for time in (0.25, 0.4, 0.6, 0.8, 1.0):
        fit = made.fit(time=time)
        assert fit.time is not None
        spent = sum(cost[str(head)] for layer in fit.layers.values() for head in layer.heads)
        assert spent <= time * 4 * 6 + 1e-9
        assert fit.time == pytest.approx(spent / 24)
        every = itertools.product(range(3), repeat=6)
        within = [each for each in every if sum(seconds[place].apart for place in each) <= time * 24 + 1e-9]
        best = min(sum(loss[place] for loss, place in zip(losses, each, strict=True)) for each in within)
        assert best - 1e-9 <= fit.predicted <= best + max(loss[0] for loss in losses)
    # A rule for all heads chooses once: the same rule that costs a head 3 costs it 1.5 there.
    assert made.fit(time=0.4).uniform_expression == CHOSEN
    assert made.fit(time=0.3).uniform_expression == NEAR
    assert [layer.links.tolist() for layer in made.fit(time=1.0).layers.values()] == [[40.0] * 3] * 2


def test_a_budget_of_links_does_not_ask_for_seconds() -> None:
    made = profile([HeadSeconds(1.0, 1.0)] * 4)
    assert made.fit(0.5).time == pytest.approx(1.0)
    untimed = LossProfile(CANDIDATES, made.measured, made.base_links).fit(0.5)
    assert untimed.time is None
    assert untimed.predicted == made.fit(0.5).predicted
    assert "time" not in untimed.to_dict()


def test_each_candidate_is_timed_as_a_fit_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are timed head by head and for all heads together, on the layer's own operands; others once."""
    model, text = llama(), ids(1, 40)
    calls: list[Any] = []
    with torch.no_grad(), use_pattern(model, None, observer=calls.append):
        model(text, use_cache=False)
    attended: list[Any] = []
    run = timing.attention
    monkeypatch.setattr(timing, "attention", lambda *args, **more: attended.append(args[3]) or run(*args, **more))
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    heads = calls[0].q.shape[1]
    assert timing.head_seconds(calls[0], read_router(CHOSEN)) == HeadSeconds(1 / heads, 1 / heads)
    q, k = calls[0].q.detach(), calls[0].k.detach()
    masks = [pattern.dense(40, heads=heads) for pattern in attended]
    assert len(masks) == 8
    wanted = (read_router(CHOSEN)(q, k) & calls[0].own).dense(40, heads=heads)
    assert all(torch.equal(mask.expand_as(wanted), wanted) for mask in masks)
    # Hashing a choice's lists would be timed with it.
    digested: list[int] = []
    run_digest = expression.digest
    monkeypatch.setattr(expression, "digest", lambda table: digested.append(1) or run_digest(table))
    timing.attention_seconds(calls[0], read_router(CHOSEN))
    assert not digested
    attended.clear()
    timing.head_seconds(calls[0], read_router("full()"))
    assert attended == [calls[0].own] * 4


def test_a_model_is_fitted_to_a_share_of_its_seconds(tmp_path: Path) -> None:
    model, tokens = llama(), ids(4, 40)
    fit = fl.hf.fit(model, tokens, time=50.0, candidates=CANDIDATES)
    assert fit.loss is not None
    assert fit.loss.time is not None
    assert fit.loss.predicted < 1e-9
    assert f"attention takes {fit.loss.time:.0%} of the seconds of full attention" in str(fit)
    assert json.loads(fit.save(tmp_path / "fit.json"))["model"]["time"] == fit.loss.time
    made = profile_loss(model, tokens[:1], CANDIDATES, timed=True)
    assert made.seconds is not None
    assert len(made.seconds) == 4
    assert all(each.apart > 0 and each.together > 0 for each in made.seconds)
    assert profile_loss(model, tokens[:1], CANDIDATES).seconds is None
    assert set(loss_expressions(None, fast=True)) != set(loss_expressions(None))
    for text in loss_expressions(None, fast=True):
        read_router(text)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"time": 0.5, "density": 0.5}, "fit: time was given beside keep or density; give one of the three."),
        ({"time": 0.5, "keep": 0.5}, "fit: time was given beside keep or density; give one of the three."),
        ({"time": 0.5, "by": "attention"}, "fit: time with by = 'attention': only candidates of a fit by loss are timed"),
        ({"time": 0.0}, "fit: time = 0.0: it is a share of the seconds of full attention, above 0."),
        ({"time": float("nan")}, "fit: time = nan: it is a share of the seconds of full attention, above 0."),
        ({"time": 0.5, "even": True}, "by='loss' with even, weigh or gist"),
        ({"time": 1e-9, "candidates": [NEAR]}, "are allowed, but the cheapest candidate takes"),
    ],
)
def test_bad_budgets_of_time_say_what_is_wrong(options: dict[str, Any], text: str) -> None:
    with pytest.raises(FarlightError) as raised:
        fl.hf.fit(llama(), ids(2, 40), **options)
    assert text in str(raised.value)


def test_the_command_line_fits_to_a_share_of_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    framed = tokenizer(False)
    for name, model in (("llama", llama(vocab_size=len(framed))), ("encoder", encoder())):
        model.save_pretrained(tmp_path / name)
        framed.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(words(300))
    capsys.readouterr()

    def run(model: str, *options: str) -> tuple[int, str, str]:
        common = ["audit", str(tmp_path / "text.txt"), "--passages", "1", "--length", "40", "--model", str(tmp_path / model)]
        with pytest.raises(SystemExit) as ended:
            main([*common, *options])
        return int(ended.value.code or 0), *capsys.readouterr()

    code, out, _ = run("llama", "--time", "50", "--candidate", NEAR, "--candidate", "full()", "--json")
    assert code == 0
    result = json.loads(out)
    assert [row["pattern"] for row in result["patterns"]] == ["fitted, time 50"]
    assert 0 < result["fit"]["time"] <= 50
    for options, says in (
        (("--time", "0"), "fit: time = 0.0: it is a share"),
        (("--time", "1", "--keep", "0.5"), "fit: time was given beside keep or density"),
        (("--time", "1", "--candidate", "window"), "candidates: 'window' with by='loss'"),
        (("--time", "1"), "BertModel has no language head"),
    ):
        code, out, err = run("encoder", *options)
        assert (code, out) == (2, "")
        assert says in err
