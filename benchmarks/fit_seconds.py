"""What fits by seconds lose beside single rules of as many seconds: `python benchmarks/fit_seconds.py --text BOOK.txt …`.

A causal language model is fitted to a share of full attention's seconds on passages of the first half of each text; the fits
and every candidate, as one rule for all heads, are judged by loss on passages of the second halves. Seconds: attention of all
layers on one judged passage, choosing and planning included, each layer's fastest call of three rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import farlight as fl
from farlight.analysis.candidates_by_layer import Subject
from farlight.analysis.fit.head_seconds import attention_seconds
from farlight.analysis.fit.loss_fit import loss_expressions, profile_loss
from farlight.analysis.loss.fidelity import measure_fidelity
from farlight.hf import use_pattern
from farlight.hf.layers import attention_layers
from farlight.hf.loading import load_model
from farlight.routing import Router, read_router
from farlight.routing.base import ConstantRouter
from quality.texts import half_passages

ROUNDS = 3


def main() -> None:
    """Fit, judge, time, and print the rows of a table by seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--time", type=float, nargs="+", default=[0.5, 0.65, 0.8], help="shares of full attention's seconds")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a passage")
    parser.add_argument("--passages", type=int, default=16, help="fitted to; half as many are judged")
    args = parser.parse_args()
    loaded = load_model(args.model)
    fitted_to, judged = (
        half_passages(args.text, loaded.tokenizer, args.length, args.passages // (half + 1), half) for half in (0, 1)
    )
    profile = profile_loss(loaded.model, fitted_to, loss_expressions(None, fast=True), timed=True, step=print)
    subjects = [Subject(text, read_router(text)) for text in profile.expressions]
    for time in args.time:
        fit = profile.fit(time=time)
        print(f"time {time}: {fit.predicted:.4f} nats predicted, at most {fit.uniform:.4f} of a single rule")
        subjects.append(Subject(f"fit, time={time}", {number: layer.pattern for number, layer in fit.layers.items()}))
    lost = measure_fidelity(loaded.model, judged, subjects, best=False).patterns
    seconds = _seconds(loaded.model, judged[:1], subjects)
    print("| attention | seconds of attention | nats lost on other text |\n|---|---|---|")
    for subject, loss in sorted(zip(subjects, lost, strict=True), key=lambda pair: -seconds[pair[0].name]):
        assert loss.language is not None
        low, high = loss.language.interval or (float("nan"), float("nan"))
        name = subject.name.replace("|", "\\|")
        print(f"| `{name}` | {seconds[subject.name]:.3f} | {loss.language.lost:.4f} ({low:.4f} … {high:.4f}) |")


def _seconds(model: Any, ids: torch.Tensor, subjects: list[Subject]) -> dict[str, float]:
    """Seconds of attention in all layers on `ids` `(1, tokens)`, by subject."""
    calls: list[Any] = []
    with torch.no_grad(), use_pattern(model, None, observer=calls.append):
        model.base_model(ids, use_cache=False)
    least: dict[tuple[str, int], float] = {}
    for _ in range(ROUNDS):
        for subject in subjects:
            for number, call in zip(attention_layers(model), calls, strict=True):
                chosen = subject.chosen[number] if isinstance(subject.chosen, Mapping) else subject.chosen
                router = chosen if isinstance(chosen, Router) else ConstantRouter(fl.full() if chosen is None else chosen)
                key = subject.name, number
                least[key] = min(attention_seconds(call, router), least.get(key, float("inf")))
    return {subject.name: sum(value for (name, _), value in least.items() if name == subject.name) for subject in subjects}


if __name__ == "__main__":
    main()
