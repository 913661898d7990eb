"""Loss, time, measures and links of each rule, added to a JSON file rule by rule; a second run goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import farlight
from farlight.analysis.fit.loss_fit import profile_loss
from farlight.analysis.loss.language import LanguageReader
from farlight.analysis.loss.retention import retentions
from farlight.cli.inputs import read_judged
from farlight.hf import read_layers, use_pattern
from farlight.hf.layers import attention_layers
from farlight.hf.setting import Observation
from farlight.patterns.expression import Pattern
from farlight.routing import Router
from quality.fits import FITS
from quality.rules import Rule
from suite.machine import machine

__all__ = ["FULL", "MEASURES", "Results", "add_links", "add_losses", "add_measures", "add_predictions", "add_seconds"]

FULL = "full()"
# Measures are taken in every third layer, links in every tenth where nothing else is measured.
MEASURED_LAYERS, COUNTED_LAYERS = 3, 10
# Measures of a head, means over layers, heads and passages; each falls as the loss grows.
MEASURES = {
    "share": "share of attention kept",
    "without_sink": "the same, without the first key",
    "output": "1 - ‖Σ lost p·v‖ / ‖output‖",
    "error": "1 - ‖sparse - full‖ / ‖full‖",
}
_DIGITS = 5
# Rules whose loss is predicted from one backward pass.
_PREDICTED_TOGETHER = 8
# Rules that are timed between two passes of full attention, which all are compared with: the rate of a machine drifts.
_TIMED_TOGETHER = 10

Passages = Sequence[tuple[str, Tensor]]


class Results:
    """The results file: {"machine": …, "timed_on": …, tokens: {expression: {"loss": {passage: nats}, "measures": {passage:
    {…}}, "links": {passage: share}, "predicted": {passage: nats}, "seconds": …}}}.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"machine": machine()}

    @property
    def lengths(self) -> list[int]:
        """The lengths of text of which there are results."""
        return sorted(int(key) for key in self.content if key.isdigit())

    def of(self, tokens: int) -> dict[str, dict[str, Any]]:
        """The results by expression, of texts of this many tokens."""
        rows: dict[str, dict[str, Any]] = self.content.setdefault(str(tokens), {})
        return rows

    def row(self, tokens: int, expression: str) -> dict[str, Any]:
        """The results of one expression, to be added to."""
        return self.of(tokens).setdefault(expression, {})

    def store(self) -> None:
        """Write the file, one line for each expression; whole or not at all."""
        parts = [f'"{name}": {json.dumps(self.content[name])}' for name in ("machine", "timed_on") if name in self.content]
        for tokens in self.lengths:
            rows = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in self.of(tokens).items() if row]
            parts.append(f'"{tokens}": {{\n' + ",\n".join(rows) + "\n}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text("{\n" + ",\n".join(parts) + "\n}\n", "utf-8")
        part.replace(self.path)


def add_losses(results: Results, model: Any, passages: Passages, rules: Sequence[Rule], seconds: float) -> bool:
    """Next-token loss of each rule on each passage, passage by passage; False where the time was too short."""
    end, reader = time.monotonic() + seconds, LanguageReader(model)
    for name, ids in passages:
        full = results.row(ids.shape[1], FULL)
        for expression in (FULL, *(rule.expression for rule in rules)):
            losses = results.row(ids.shape[1], expression).setdefault("loss", {})
            if name in losses:
                continue
            if time.monotonic() > end:
                return False
            with use_pattern(model, None if expression == FULL else read_rule(expression)):
                by_token = reader(ids)[1]
            assert by_token is not None
            losses[name] = round(float(by_token.double().mean()), _DIGITS)
            results.store()
            print(f"{losses[name] - full['loss'][name]:+.4f} nats, {ids.shape[1]} tokens of {name}: {expression}", flush=True)
    return True


def add_seconds(results: Results, model: Any, passages: Passages, rules: Sequence[Rule], seconds: float) -> bool:
    """The seconds of each rule's fastest pass, choice and planning included, all rules in turn over each passage. Ratios need
    one run, so those of an earlier run go. False where the time was too short.
    """
    end, reader, tokens = time.monotonic() + seconds, LanguageReader(model), passages[0][1].shape[1]
    for row in results.of(tokens).values():
        row.pop("seconds", None)
    results.content["timed_on"] = machine()
    results.store()
    reader(passages[0][1])  # the first pass of a process allocates what later ones find
    groups = [rules[first : first + _TIMED_TOGETHER] for first in range(0, len(rules), _TIMED_TOGETHER)]
    for _, ids in passages:
        for expression in (each for group in groups for each in (FULL, *(rule.expression for rule in group))):
            if time.monotonic() > end:
                return False
            start = time.monotonic()
            with use_pattern(model, None if expression == FULL else read_rule(expression)):
                reader(ids)
            row, taken = results.row(tokens, expression), round(time.monotonic() - start, 4)
            row["seconds"] = min(taken, row.get("seconds", taken))
            results.store()
            print(f"{taken:.1f} s, {tokens} tokens: {expression}", flush=True)
    return True


def add_measures(results: Results, model: Any, passages: Passages, rules: Sequence[Rule], seconds: float) -> bool:
    """Links and `MEASURES` of each rule on each passage, from the full run's q, k and v; False where the time was too short."""
    return _add_from_calls(results, model, passages, rules, seconds, MEASURED_LAYERS, "measures", _measures)


def add_links(results: Results, model: Any, passages: Passages, rules: Sequence[Rule], seconds: float) -> bool:
    """Links of each rule on each passage as a share of all causal links; False where the time was too short."""
    for name, ids in passages:
        for rule in rules:
            pattern, n = read_rule(rule.expression), ids.shape[1]
            if isinstance(pattern, Pattern):
                share = (pattern & farlight.causal()).count(n) / farlight.causal().count(n)
                results.row(n, rule.expression).setdefault("links", {})[name] = round(share, _DIGITS)
    results.store()
    # A fit differs from layer to layer.
    step = 1 if any(rule.expression.endswith(".json") for rule in rules) else COUNTED_LAYERS
    return _add_from_calls(results, model, passages, rules, seconds, step, "links", _links)


def add_predictions(results: Results, model: Any, passages: Passages, rules: Sequence[Rule], seconds: float) -> bool:
    """The loss that a fit predicts for each rule on each passage, all heads under it; False where the time was too short."""
    end = time.monotonic() + seconds
    for name, ids in passages:
        rows = [(rule, results.row(ids.shape[1], rule.expression).setdefault("predicted", {})) for rule in rules]
        missing = [(rule, predicted) for rule, predicted in rows if name not in predicted]
        for first in range(0, len(missing), _PREDICTED_TOGETHER):
            if time.monotonic() > end:
                return False
            together = missing[first : first + _PREDICTED_TOGETHER]
            profile = profile_loss(model, ids, [rule.expression for rule, _ in together])
            nats = sum(table[:, 2].sum(-1) for table in profile.measured.values())
            for (rule, predicted), value in zip(together, torch.as_tensor(nats).tolist(), strict=True):
                predicted[name] = round(value, _DIGITS)
                print(f"{value:+.4f} nats predicted, {ids.shape[1]} tokens of {name}: {rule.expression}", flush=True)
            results.store()
    return True


def _add_from_calls(
    results: Results,
    model: Any,
    passages: Passages,
    rules: Sequence[Rule],
    seconds: float,
    layer_step: int,
    field: str,
    measured: Callable[[Any, Sequence[Observation]], Any],
) -> bool:
    """Add `measured(rule, attention calls of every layer_step-th layer)` to `field` for each passage and rule."""
    end = time.monotonic() + seconds
    numbers = {id(module): number for number, module in attention_layers(model).items()}
    for name, ids in passages:
        calls: list[Observation] = []

        def observe(call: Observation, calls: list[Observation] = calls) -> None:
            if numbers[id(call.module)] % layer_step == 0:
                calls.append(call)

        for rule in rules:
            by_passage = results.row(ids.shape[1], rule.expression).setdefault(field, {})
            if name in by_passage:
                continue
            if time.monotonic() > end:
                return False
            if not calls:
                with use_pattern(model, None, observer=observe):
                    LanguageReader(model, with_loss=False)(ids)
            by_passage[name] = measured(read_rule(rule.expression), calls)
            results.store()
            print(f"{field} {by_passage[name]}: {ids.shape[1]} tokens of {name}: {rule.expression}", flush=True)
    return True


def read_rule(expression: str) -> Any:
    """The pattern or router of an expression, or the routers by layer of a fit's file."""
    return read_layers(FITS / expression) if expression.endswith(".json") else read_judged([expression])[0]


def _on(rule: Any, call: Observation) -> Pattern:
    """The rule's pattern in one attention call."""
    rule = rule[call.module.layer_idx] if isinstance(rule, Mapping) else rule
    pattern: Pattern = rule(call.q, call.k) if isinstance(rule, Router) else rule
    return pattern


def _links(rule: Any, calls: Sequence[Observation]) -> float:
    """Links as a share of the model's own, mean over the layers of `calls`."""
    shares = []
    for call in calls:
        heads, n = call.q.shape[1:3]
        pairs = farlight.plan(_on(rule, call) & call.own, n, heads=heads, backend="cpu").pairs
        shares.append(pairs / (heads * call.own.count(n)))
    return round(sum(shares) / len(shares), _DIGITS)


def _measures(rule: Any, calls: Sequence[Observation]) -> dict[str, float]:
    """Links and `MEASURES` of a rule, means over the layers of `calls`."""
    sums = dict.fromkeys(("links", *MEASURES), 0.0)
    for call in calls:
        result = retentions(call.q, call.k, [_on(rule, call)], call.v, base=call.own, scale=call.scale)[0]
        assert result.error is not None
        assert result.lost_output is not None
        assert result.mass_without_sink is not None
        sums["links"] += float(result.links.sum() / result.base_links.sum())
        sums["share"] += float(result.mass.mean())
        sums["without_sink"] += float(result.mass_without_sink.mean())
        sums["output"] += float(1 - result.lost_output.mean())
        sums["error"] += float(1 - result.error.mean())
    return {name: round(value / len(calls), _DIGITS) for name, value in sums.items()}
