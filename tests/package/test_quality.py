"""What rules cost a language model: measured on a small one, resumed where it stopped; the page's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from farlight.analysis.recall.answers import FULL as FULL_ATTENTION
from farlight.cli.inputs import read_judged
from quality.fits import fit_rules
from quality.measure import (
    FULL,
    MEASURES,
    Results,
    add_links,
    add_losses,
    add_measures,
    add_predictions,
    add_seconds,
    read_rule,
)
from quality.page import page, spearman
from quality.recall_page import recall_section
from quality.rules import SINKS, Rule, rules

RULES = [Rule("window", "a paper", "window(8, 0)"), Rule("blocks", "another", "topblocks(2, block=4, causal=True)")]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50, initializer_range=0.3)).eval()
    passages = [(f"text {number}", torch.randint(0, 50, (1, 64))) for number in range(2)]
    path = tmp_path / "results.json"
    assert not add_losses(Results(path), model, passages, RULES, 0.0)
    assert add_losses(Results(path), model, passages[:1], RULES, 1e9)
    first = Results(path).of(64)
    assert add_losses(Results(path), model, passages, RULES, 1e9)
    for step in (add_measures, add_links, add_predictions, add_seconds):
        assert step(Results(path), model, passages, RULES, 1e9)
    # Seconds of different runs are never mixed: a run that stops at once has removed those of the run before.
    assert not add_seconds(Results(path), model, passages, RULES, 0.0)
    assert not any("seconds" in row for row in Results(path).of(64).values())
    assert add_seconds(Results(path), model, passages, RULES, 1e9)
    rows = Results(path).of(64)
    assert list(rows) == [FULL, *(rule.expression for rule in RULES)]
    for expression, row in rows.items():
        assert list(row["loss"]) == ["text 0", "text 1"]
        assert row["loss"]["text 0"] == first[expression]["loss"]["text 0"]
        assert row["seconds"] > 0
    for rule in RULES:
        row = rows[rule.expression]
        assert row["loss"] != rows[FULL]["loss"]
        assert row["predicted"]["text 0"] > 0
        assert row["measures"]["text 0"].keys() == {"links", *MEASURES}
        # Layer 0 alone is counted in so small a model, measures are those of layer 0 too.
        assert row["links"]["text 0"] == pytest.approx(row["measures"]["text 0"]["links"], abs=2e-5)


def test_every_rule_can_be_read() -> None:
    for tokens in (2048, 8192):
        expressions = [rule.expression for rule in rules(tokens)]
        assert len(set(expressions)) == len(expressions) >= 40
        read_judged(expressions)
    # Answers of `farlight recall` lie in the same folder and are no fits.
    fits = fit_rules()
    assert {rule.expression for rule in fits} >= {"blocks-0.12.json", "blocks-0.2.json", "positions-0.18.json"}
    for rule in fits:
        assert isinstance(read_rule(rule.expression), dict)


def test_the_page_shows_losses_and_their_ranks(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    full = results.row(2048, FULL)
    full |= {"loss": {f"book {number}": 2.0 for number in range(4)}, "seconds": 0.2}
    for index, rule in enumerate(rules(2048)):
        row = results.row(2048, rule.expression)
        row["seconds"] = 0.1 + index / 1000
        row["loss"] = {f"book {number}": 2.01 + index / 100 + number / 1000 for number in range(4)}
        row["measures"] = {
            "book 1": dict.fromkeys(MEASURES, -float(index)) | {"links": 0.2 - index / 1000, "share": index / 1.0}
        }
    text = page(results)
    expression = rules(2048)[0].expression.replace("seen_by_all([0, 1, 2, 3])", "sinks").replace("|", "\\|")
    assert f"`{expression}` | 20.0% | 0.011 | 0.009 … 0.014 | 0.1 |" in text
    assert "One pass under full attention takes 0.2 s." in text
    assert f"| 70% | 0.011 | `{expression}` |" in text
    count = len(rules(2048))
    assert f"| 1 - ‖sparse - full‖ / ‖full‖ | book 1 | {count} | 1.000 | 1.000 | nan |" in text
    assert f"| share of attention kept | book 1 | {count} | -1.000 |" in text


def test_the_page_is_that_of_the_results() -> None:
    root = Path(__file__).parents[2]
    assert (root / "docs" / "quality.md").read_text("utf-8") == page(Results(root / "benchmarks/results/quality/smollm2.json"))


def test_answers_of_several_seeds_are_added_up(tmp_path: Path) -> None:
    """Of a rule only the questions that full attention was asked too."""
    assert recall_section(tmp_path) == ""
    for seed in (0, 1):
        answers = {f"{FULL_ATTENTION} | keys | 512 | {n}": n > 0 for n in range(4)}
        answers |= {f"window(8, 0) | {SINKS} | keys | 512 | {n}": n % 2 == seed for n in range(5)}
        content = {"seed": seed, "questions": 4, "answers": answers}
        (tmp_path / f"recall-{seed}.json").write_text(json.dumps(content))
    text = recall_section(tmp_path)
    assert "| 512 | keys | full attention | 6 of 8 | 41% … 93% |  |  |  |" in text
    assert "| 512 | keys | `window(8, 0) \\| sinks` | 4 of 8 | 22% … 78% | 3 | 3 | 1 |" in text
    asked = "farlight recall --model smollm2 --task keys --length 512 --questions 4"
    for seed in ("", " --seed 1"):
        assert text.count(f"{asked}{seed} --pattern 'window(8, 0) | {SINKS}'") == 1


def test_links_that_were_not_counted_are_named(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    for expression in (FULL, rules(2048)[0].expression):
        results.row(2048, expression)["loss"] = {"book 0": 2.0}
    with pytest.raises(ValueError, match=r"links at 2048 tokens are missing of .*topblocks.*losses.py links"):
        page(results)


def test_equal_values_share_a_rank() -> None:
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1.0)
    assert spearman([3, 1, 2], [1, 3, 2]) == pytest.approx(-1.0)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
