"""A book as vectors: each chapter is read in one pass, and passages are means of tokens that have seen the whole chapter.

The usual way cuts a text first and embeds each piece blind to the others. Here the model is lengthened and run under a
sparse pattern, so that a chapter fits, and it is cut afterwards ("late chunking"; Günther et al. 2024, arXiv:2409.04701).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.attention import attention
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.interface import Observation, use_pattern
from farlight.hf.lengthen import lengthen, positions_of
from farlight.patterns.expression import Pattern
from farlight.patterns.positional import full

__all__ = ["Embedder", "Looked", "Reading", "Tokens"]

_WORD = re.compile(r"[^\W_]+(?:[’'-][^\W_]+)*")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text without special ones: `ids[t]` stands for the characters `spans[t]` of it."""

    ids: list[int]
    spans: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)

    def covering(self, start: int, stop: int) -> tuple[int, int]:
        """First token and last + 1 of those that begin in `start … stop - 1`."""
        inside = [t for t, (a, b) in enumerate(self.spans) if start <= a < stop and b > a]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


@dataclass(frozen=True)
class Reading:
    """What one pass over a stretch of tokens gave: `states` `(n, D)` without special tokens, and `vector` `(D,)`, the unit
    mean over all tokens, special ones included, as the model's own pooling has it.
    """

    states: Tensor
    vector: Tensor

    def passages(self, bounds: Iterable[tuple[int, int]]) -> Tensor:
        """`(P, D)`: the unit mean of the states of each stretch of tokens."""
        sums = torch.cat([torch.zeros_like(self.states[:1], dtype=torch.float64), self.states.double().cumsum(0)])
        starts, stops = torch.tensor(list(bounds), dtype=torch.int64).reshape(-1, 2).unbind(1)
        means = (sums[stops] - sums[starts]) / (stops - starts).clamp(min=1)[:, None]
        return torch.nn.functional.normalize(means, dim=-1).float()


@dataclass(frozen=True)
class Looked:
    """A word that attention fell on: the characters `start … stop - 1`, and its share of what fell on words."""

    word: str
    start: int
    stop: int
    share: float


class Embedder:
    """An encoder that reads long texts under a pattern. The model is lengthened in place where it must be.

    `positions` is the longest stretch, in tokens, special ones included. Raises UnsupportedError for a tokenizer that does not
    tell where its tokens stand, and what `fl.hf.lengthen` and `fl.hf.use_pattern` raise.
    """

    def __init__(self, model: Any, tokenizer: Any, pattern: Pattern, *, positions: int, backend: str = "auto") -> None:
        from farlight.analysis.passages import frame

        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError(
                f"{type(tokenizer).__name__} does not tell which characters a token stands for; use a fast tokenizer."
            )
        reach = positions_of(model)
        if reach is not None and reach < positions:
            lengthen(model, positions, tokenizer=tokenizer)
        self.model, self.tokenizer, self.pattern, self.backend = model.eval(), tokenizer, pattern, backend
        self.before, self.after = frame(tokenizer)
        self.room = positions - len(self.before) - len(self.after)
        if self.room < 1:
            raise ArgumentError(f"{positions} positions leave no room beside the special tokens; use more.")

    def tokens(self, text: str) -> Tokens:
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
        return Tokens(found["input_ids"], [tuple(span) for span in found["offset_mapping"]])

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Reading:
        """One pass over at most `room` tokens."""
        with use_pattern(self.model, self.pattern, backend=self.backend):
            states = self._pass(ids)
        vector = torch.nn.functional.normalize(states.mean(0), dim=0)
        return Reading(states[len(self.before) : states.shape[0] - len(self.after)], vector)

    def looked_at(self, text: str, tokens: Tokens, passage: tuple[int, int], query: Tensor, count: int) -> list[Looked]:
        """The `count` words on which most attention fell: that of the passage's tokens in the last layer, all heads.

            a_j = Σ_i w_i · mean_h P_h[i, j],   w_i ∝ max(0, cos(query, state_i)),   i in the passage

        so tokens that answer the query speak most. Attention on special tokens and punctuation is left out; shares are of
        what fell on words. A word that occurs several times is shown where most fell on it.
        """
        seen: list[Observation] = []

        def keep(found: Observation) -> None:
            seen[:] = [found]

        with torch.no_grad(), use_pattern(self.model, self.pattern, backend=self.backend, observer=keep):
            states = self._pass(tokens.ids)
        (last,) = seen
        start, stop = (t + len(self.before) for t in passage)
        weights = torch.nn.functional.cosine_similarity(states[start:stop], query[None]).clamp(min=0)
        weights = weights / weights.sum().clamp(min=1e-12)
        received = _received(last, self.pattern, start, stop, weights)[len(self.before) :]
        fallen: dict[str, tuple[float, float, re.Match[str]]] = {}
        at = 0
        for match in _WORD.finditer(text, tokens.spans[0][0], tokens.spans[-1][1]):
            while at < len(tokens) and tokens.spans[at][1] <= match.start():
                at += 1
            mine, t = 0.0, at
            while t < len(tokens) and tokens.spans[t][0] < match.end():
                mine += float(received[t])
                t += 1
            total, most, where = fallen.get(match[0].casefold(), (0.0, -1.0, match))
            fallen[match[0].casefold()] = (total + mine, max(most, mine), match if mine > most else where)
        whole = sum(total for total, _, _ in fallen.values()) or 1.0
        ranked = sorted(fallen.values(), key=lambda entry: -entry[0])[:count]
        return [Looked(where[0], where.start(), where.end(), total / whole) for total, _, where in ranked]

    def _pass(self, ids: Sequence[int]) -> Tensor:
        """`(n, D)` last hidden states, special tokens included."""
        if not 0 < len(ids) <= self.room:
            raise ArgumentError(f"a stretch of {len(ids)} tokens cannot be read in one pass; between 1 and {self.room} can.")
        device = next(self.model.parameters()).device
        framed = torch.tensor([[*self.before, *ids, *self.after]], device=device)
        states: Tensor = self.model(input_ids=framed)[0][0]
        return states.float().cpu()


def _received(last: Observation, pattern: Pattern, start: int, stop: int, weights: Tensor) -> Tensor:
    """`(n,)` attention from rows `start … stop - 1`, weighted, mean over heads.

    The gradient of a weighted sum of outputs with respect to values is the weighted sum of probabilities, so one backward
    pass gives every column without forming a row.
    """
    allowed = pattern if last.own == full() else last.own & pattern
    q, k = last.q[:, :, start:stop].detach(), last.k.detach()
    v = torch.zeros_like(k).requires_grad_()
    with torch.enable_grad():
        out = attention(q, k, v, allowed, scale=last.scale, q_offset=last.q_offset + start)
        assert isinstance(out, Tensor)
        out.backward(weights.to(out)[None, None, :, None].expand_as(out).contiguous() / q.shape[1])
    assert v.grad is not None
    received: Tensor = v.grad[0, :, :, 0].sum(0).float().cpu()
    return received
