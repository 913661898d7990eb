"""Fits of causal language models by predicted loss: a budget of links or of seconds over all heads, spent where the model
needs it.

The kept share of attention weighs all heads alike, but heads differ in how far their output moves the loss. What a candidate
costs is therefore predicted from one pass and one backward pass of full attention on each passage. With D the change
of a head's output under the candidate and g the gradient, with respect to that output, of the loss of tokens drawn from the
model's own predictions, the divergence of the predictions is to second order

    ½ E[(Σ g·D)²]  ≈  ½ Σ_rows (g·D)²        (the Fisher information; errors of different rows and heads taken as independent)

in nats, summed over the judged tokens. Candidates are run by the sparse kernels, so memory is linear in the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from farlight.analysis.fit.fit import Fit, layer_fit
from farlight.analysis.fit.frontier import Option, allocate
from farlight.analysis.fit.head_seconds import HeadSeconds, head_seconds
from farlight.analysis.loss.kernel_shares import KernelShares, kept_share
from farlight.analysis.loss.language import LanguageReader, first_judged, is_language_model, logit_rows
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.interface import Observation, use_pattern
from farlight.hf.layers import attention_layers
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router
from farlight.routing.notation import is_router, read_router

__all__ = ["LossFit", "LossProfile", "loss_expressions", "profile_loss", "profile_steps"]


@dataclass(frozen=True)
class LossFit:
    """Layers by number, and the predicted loss in nats per token, of the fit and of the best single candidate of its budget.

    time: seconds of its candidates as a share of those of full attention, where they were measured.
    """

    layers: dict[int, Fit]
    predicted: float
    uniform: float | None
    uniform_expression: str | None
    time: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable predictions."""
        values = {"predicted_nats": self.predicted, "uniform_nats": self.uniform, "uniform": self.uniform_expression}
        return values if self.time is None else values | {"time": self.time}


@dataclass(frozen=True)
class LossProfile:
    """Means over passages, by layer number: `(expressions, 3, H)` float64 of links, kept share and predicted nats per token.

    Attributes:
        base_links: by layer number, `(H,)` float64, the links of full attention.
        seconds: of each expression and, last, of full attention in one head, means over layers (`head_seconds`); None where
            nothing was timed.
    """

    expressions: list[str]
    measured: dict[int, Tensor]
    base_links: dict[int, Tensor]
    seconds: list[HeadSeconds] | None = None

    def fit(self, density: float | None = None, *, time: float | None = None) -> LossFit:
        """The candidates of least predicted loss, one for each head, whose links are at most `density` of all, or whose seconds
        are at most `time` of those of full attention. One of the two is given, `time` where candidates were timed.

        Raises ArgumentError where the cheapest candidates take more.
        """
        stacked = torch.stack(list(self.measured.values()))  # (layers, expressions, 3, H)
        # Multiples of a head's mean loss under the candidate that loses most: `allocate` compares values with constants.
        unit = float(stacked[:, :, 2].sum(-1).sum(0).amax()) / (stacked.shape[0] * stacked.shape[3]) or 1.0
        options = [
            [
                [
                    Option(links, kept, -nats / unit, partial(str, text), "content" if is_router(text) else "given")
                    for text, (links, kept, nats) in zip(self.expressions, table[:, :, head].tolist(), strict=True)
                ]
                for head in range(table.shape[2])
            ]
            for table in self.measured.values()
        ]
        heads = [head for layer in options for head in layer]
        totals = stacked.sum((0, 3))  # (expressions, 3)
        if time is None:
            assert density is not None
            budget = density * float(sum(links.sum() for links in self.base_links.values()))
            costs, picked = totals[:, 0].tolist(), allocate(heads, links=budget)
        else:
            assert self.seconds is not None
            budget = time * self.seconds[-1].together * len(heads)
            costs = [each.together * len(heads) for each in self.seconds[:-1]]
            picked = _allocate_seconds(heads, [each.apart for each in self.seconds[:-1]], budget)
        chosen = iter(picked)
        layers = {
            number: layer_fit(layer, [next(chosen) for _ in layer], self.base_links[number])
            for number, layer in zip(self.measured, options, strict=True)
        }
        within = [index for index, cost in enumerate(costs) if cost <= budget * (1 + 1e-9)]
        best = min(within, key=lambda index: float(totals[index, 2]), default=None)
        nats, text = (None, None) if best is None else (float(totals[best, 2]), self.expressions[best])
        return LossFit(layers, -sum(option.value for option in picked) * unit, nats, text, self._time_of(picked))

    def _time_of(self, picked: Sequence[Option]) -> float | None:
        """Seconds of the picked options as a share of those of full attention."""
        if self.seconds is None:
            return None
        by_text = {text: each.apart for text, each in zip(self.expressions, self.seconds, strict=False)}
        return sum(by_text[str(option.make())] for option in picked) / (self.seconds[-1].together * len(picked))


def _allocate_seconds(heads: Sequence[Sequence[Option]], seconds: Sequence[float], budget: float) -> list[Option]:
    """As `allocate` within `budget`, where option x of every head costs seconds[x] instead of its links."""
    priced = [[replace(option, links=cost) for option, cost in zip(head, seconds, strict=True)] for head in heads]
    places = [{id(option): place for place, option in enumerate(head)} for head in priced]
    if len(heads) * min(seconds) > budget:
        raise ArgumentError(
            f"{budget * 1e3:.3g} ms are allowed, but the cheapest candidate takes {len(heads) * min(seconds) * 1e3:.3g} ms in "
            f"all {len(heads)} heads; allow more, or give cheaper ones."
        )
    picked = allocate(priced, links=budget)
    return [head[place[id(option)]] for head, place, option in zip(heads, places, picked, strict=True)]


def loss_expressions(candidates: Sequence[str | Pattern] | None, *, fast: bool = False) -> list[str]:
    """The candidates of a fit by loss as expressions. None: blocks of 2 keys, chosen for 4 or 16 queries by share or mass,
    windows, full attention; `fast`: blocks of 8, 16 and 64 keys in place of those of 2, which take long to choose.

    Raises ArgumentError for a family whose members are grown from attention shares, PatternError for an unreadable expression.
    """
    if candidates is None and fast:
        windows = [_near(width) for width in (8, 16, 32, 64, 128, 256, 512)]
        small = [_blocks(f"share={share}", 16, block) for block in (8, 16) for share in (0.04, 0.08, 0.16, 0.32)]
        large = [_blocks(f"share={share}", 64, 64) for share in (0.1, 0.2, 0.4)]
        return [*windows, *small, *large, "full()"]
    if candidates is None:
        windows = [_near(width) for width in (8, 16, 32, 64, 128, 256)]
        fine = [_blocks(f"share={share}", 4) for share in (0.01, 0.02, 0.035, 0.06, 0.1, 0.16, 0.25, 0.4)]
        coarse = [_blocks(f"share={share}", 16) for share in (0.02, 0.06, 0.14, 0.3)]
        coarse += [_blocks(f"mass={mass}", 16) for mass in (0.7, 0.9)]
        return [*windows, *fine, *coarse, "full()"]
    texts = [
        repr(each) if isinstance(each, Pattern) else str(each)
        for each in ([candidates] if isinstance(candidates, str | Pattern) else candidates)
    ]
    for text in texts:
        if text.isidentifier():
            raise ArgumentError(
                f"candidates: {text!r} with by='loss': candidates are run, so each is a pattern or an expression, such as "
                "'topblocks(share=0.1, block=4, causal=True) | window(32, 0)'; by='attention' knows the families."
            )
        read_router(text)
    if not texts:
        raise ArgumentError("candidates is empty; give at least one, or None for blocks of 2 keys and windows.")
    return texts


def _near(width: int) -> str:
    return f"window({width}, 0) | seen_by_all([0, 1, 2, 3])"


def _blocks(budget: str, queries: int, block: int = 2) -> str:
    """Chosen key blocks; the window reaches the keys behind the last block that all queries of a list may choose."""
    return f'topblocks({budget}, block={block}, query_block={queries}, causal=True, score="softmax") | {_near(queries)}'


def profile_steps(passages: int) -> list[str]:
    """The labels that `profile_loss` passes to its `step`."""
    stages = ("full attention and its gradients", "candidates")
    return [f"{stage}: passage {index + 1} of {passages}" for index in range(passages) for stage in stages]


def profile_loss(
    model: Any,
    ids: Tensor,
    expressions: Sequence[str],
    *,
    timed: bool = False,
    step: Callable[[str], None] = lambda label: None,
) -> LossProfile:
    """Predicted loss, kept share and links of every expression in every head, means over the passages `(passages, tokens)`;
    `timed`: and their seconds, on the first passage.

    Raises UnsupportedError for a model that is no causal language model, or whose attention cannot be observed.
    """
    if not is_language_model(model):
        raise UnsupportedError(
            f"{type(model).__name__} has no language head, so there is no loss to fit to; load it by AutoModelForCausalLM, or "
            "fit by='attention'."
        )
    routers, reader = [read_router(text) for text in expressions], LanguageReader(model)
    shares = KernelShares()
    sums: dict[int, Tensor] = {}
    base_links: dict[int, Tensor] = {}
    timings: list[list[HeadSeconds]] = []  # by layer
    everything = read_router("full()")
    labels = iter(profile_steps(len(ids)))
    for index, passage in enumerate(ids):
        step(next(labels))
        calls = _calls_with_gradients(reader, passage[None], index)
        step(next(labels))
        judged = passage.numel() - first_judged(passage.numel())
        while calls:  # released one by one
            number = min(calls)
            call, gradient = calls.pop(number)
            if timed and not index:
                timings.append([head_seconds(call, router) for router in (*routers, everything)])
            measured, base = _measure(call, gradient, routers, judged, shares)
            sums[number] = sums.get(number, 0) + measured / len(ids)
            base_links[number] = base_links.get(number, 0) + base / len(ids)
    means = torch.tensor(timings, dtype=torch.float64).mean(0).tolist() if timed else None
    seconds = None if means is None else [HeadSeconds(*pair) for pair in means]
    return LossProfile(list(expressions), sums, base_links, seconds)


def _measure(
    call: Observation, gradient: Tensor, routers: Sequence[Router], judged: int, shares: KernelShares
) -> tuple[Tensor, Tensor]:
    """(`(routers, 3, H)` links, kept share and nats per judged token, `(H,)` links of full attention) of one layer's call."""
    whole = shares.full(call)
    base_links, rows = whole.links.sum(0), []
    for router in routers:
        sparse = shares.under(call, router)
        if sparse is None:
            rows.append(torch.stack([base_links, torch.ones_like(base_links), torch.zeros_like(base_links)]))
            continue
        kept = kept_share(sparse.lse, whole.lse).mean(0)
        nats = ((sparse.out - whole.out) * gradient).sum(-1).double().square().sum((0, 2)).cpu() / (2 * judged)
        rows.append(torch.stack([sparse.links.sum(0), kept, nats]))
    return torch.stack(rows), base_links


def _calls_with_gradients(reader: LanguageReader, ids: Tensor, seed: int) -> dict[int, tuple[Observation, Tensor]]:
    """By layer number: the attention call of full attention on `ids` `(1, N)`, and the gradient `(1, H, N, D)` with respect to
    its output of the loss, summed over the judged tokens, of tokens drawn from the model's predictions.
    """
    model = reader.model
    calls: list[Observation] = []
    outputs: list[Tensor] = []

    def observe(call: Observation) -> Callable[[Tensor], None]:
        calls.append(call)
        return observe_output

    def observe_output(out: Tensor) -> None:
        # The first layer's output is no function of anything that requires a gradient, so it becomes the root of the graph.
        outputs.append(out if out.requires_grad else out.requires_grad_())

    with _frozen(model), torch.enable_grad(), use_pattern(model, None, observer=observe):
        numbers = {id(module): number for number, module in attention_layers(model).items()}
        _, rows, head = reader.read(ids.to(model.device))
        if not calls:
            raise UnsupportedError(
                f"{type(model).__name__} accepted another attention implementation but never called it; its attention cannot "
                "be fitted. Use a model whose layers call transformers' AttentionInterface."
            )
        # `read` may repeat its pass, which is then observed again: the last one begins with the last call of the first module.
        start = max(index for index, call in enumerate(calls) if call.module is calls[0].module)
        judged = rows[0, first_judged(ids.shape[1]) - 1 : -1]
        gradients = torch.autograd.grad(judged, outputs[start:], _gradient_of_drawn(judged.detach(), head, seed))
    pairs = zip(calls[start:], gradients, strict=True)
    return {numbers[id(call.module)]: (call, gradient) for call, gradient in pairs}


def _gradient_of_drawn(rows: Tensor, head: Any, seed: int) -> Tensor:
    """The gradient with respect to `rows`, logits or with a `head` what it makes logits of, of the summed loss of tokens drawn
    from the predictions. Logits are formed for some rows at a time.
    """
    generator = torch.Generator(rows.device).manual_seed(seed)
    parts = []
    for part in rows.split(logit_rows(rows.shape[1] if head is None else head.weight.shape[0])):
        part = part.requires_grad_()
        logits = (part if head is None else head(part)).float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        parts.append(torch.autograd.grad(functional.cross_entropy(logits, drawn, reduction="sum"), part)[0])
    return torch.cat(parts)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No parameter requires a gradient inside the block: only what attention gives does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
