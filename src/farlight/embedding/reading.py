"""Encoding long texts: a lengthened encoder under a sparse pattern, passage vectors by late chunking, attended words.

The usual way cuts a text first and embeds each piece without its context. Here a whole chapter goes through the model in one
pass, which `fl.hf.lengthen` and a sparse pattern make possible, and is cut afterwards: a passage vector is the mean of its
tokens' last hidden states ("late chunking"; Günther et al. 2024, arXiv:2409.04701). All tensors leave this module as float32 on
the CPU.
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
from farlight.hf.loading import load_model
from farlight.patterns import parse
from farlight.patterns.expression import Pattern
from farlight.patterns.positional import full

__all__ = ["DEFAULT_PATTERN", "AttendedWord", "Embedder", "Encoding", "Tokens"]

# The first and last token ([CLS] and [SEP], say) are global.
DEFAULT_PATTERN = "window(128) | global_tokens([0, -1])"

_WORD = re.compile(r"[^\W_]+(?:[’'-][^\W_]+)*")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text without special tokens: `ids[t]` encodes the characters `spans[t]` = (start, stop)."""

    ids: list[int]
    spans: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)

    def token_range(self, start: int, stop: int) -> tuple[int, int]:
        """(first, last + 1) of the tokens that begin in characters `start … stop - 1`; (0, 0) for none."""
        inside = [t for t, (a, b) in enumerate(self.spans) if start <= a < stop and b > a]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


@dataclass(frozen=True)
class Encoding:
    """The result of one pass over a text of n tokens.

    Attributes:
        states: `(n, features)` float32, last hidden states without those of special tokens.
        vector: `(features,)` float32, unit mean over all tokens, special ones included (the model's own mean pooling).
    """

    states: Tensor
    vector: Tensor

    def passages(self, bounds: Iterable[tuple[int, int]]) -> Tensor:
        """`(passages, features)` float32: the unit mean of the states of each token range [first, last + 1)."""
        prefix = torch.cat([torch.zeros_like(self.states[:1], dtype=torch.float64), self.states.double().cumsum(0)])
        starts, stops = torch.tensor(list(bounds), dtype=torch.int64).reshape(-1, 2).unbind(1)
        means = (prefix[stops] - prefix[starts]) / (stops - starts).clamp(min=1)[:, None]
        return torch.nn.functional.normalize(means, dim=-1).float()


@dataclass(frozen=True)
class AttendedWord:
    """A word at characters `start … stop - 1`, and its share of the attention on all words."""

    word: str
    start: int
    stop: int
    share: float


class Embedder:
    """An encoder model under a pattern, for texts of up to `positions` tokens, special tokens included.

    The model is put in evaluation mode, and lengthened in place when it has fewer positions. `max_tokens`: tokens of one pass
    without special ones; `name`: of the model. Raises UnsupportedError for a tokenizer without character offsets, ArgumentError
    for too few positions, and what `fl.hf.lengthen` and `fl.hf.use_pattern` raise.
    """

    @classmethod
    def load(
        cls, model: str | None = None, pattern: Pattern | None = None, *, positions: int = 8192, backend: str = "auto"
    ) -> Embedder:
        """The embedder of a folder or a name of the Hugging Face hub; None: the packaged all-MiniLM-L6-v2.

        pattern: by default `window(128) | global_tokens([0, -1])`. Raises as `load_model` and the constructor.
        """
        loaded = load_model(model)
        pattern = parse(DEFAULT_PATTERN) if pattern is None else pattern
        # A language model comes with its head, whose first output are logits.
        embedder = cls(loaded.model.base_model, loaded.tokenizer, pattern, positions=positions, backend=backend)
        embedder.name = loaded.name
        return embedder

    def __repr__(self) -> str:
        return f"<Embedder {self.name} under {self.pattern}: {self.max_tokens:,} tokens in a pass>"

    def __init__(self, model: Any, tokenizer: Any, pattern: Pattern, *, positions: int = 8192, backend: str = "auto") -> None:
        from farlight.analysis.passages import frame

        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError(
                f"{type(tokenizer).__name__} does not tell which characters a token stands for; use a fast tokenizer."
            )
        model_positions = positions_of(model)
        if model_positions is not None and model_positions < positions:
            lengthen(model, positions, tokenizer=tokenizer)
        self.model, self.tokenizer, self.pattern, self.backend = model.eval(), tokenizer, pattern, backend
        self.name: str = getattr(model, "name_or_path", "") or type(model).__name__
        self.prefix_ids, self.suffix_ids = frame(tokenizer)
        self.max_tokens = positions - len(self.prefix_ids) - len(self.suffix_ids)
        if self.max_tokens < 1:
            raise ArgumentError(f"{positions} positions leave no room beside the special tokens; use more.")

    def embed(self, texts: Sequence[str]) -> Tensor:
        """`(texts, features)` float32 unit vectors, one pass for each text. Raises ArgumentError for one longer than a pass."""
        encodings = []
        for text in texts:
            ids = self.tokens(text).ids
            if len(ids) > self.max_tokens:
                raise ArgumentError(
                    f"a text has {len(ids)} tokens, more than the {self.max_tokens} that one pass reads; shorten it, or cut it "
                    "with read_books."
                )
            encodings.append(self.read(ids).vector)
        return torch.stack(encodings)

    def tokens(self, text: str) -> Tokens:
        """The tokens of `text`, of any length."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
        return Tokens(encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]])

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Encoding:
        """Encode 1 to `max_tokens` token ids in one pass. Raises ArgumentError for another number of them."""
        with use_pattern(self.model, self.pattern, backend=self.backend):
            states = self._hidden_states(ids)
        vector = torch.nn.functional.normalize(states.mean(0), dim=0)
        return Encoding(states[len(self.prefix_ids) : states.shape[0] - len(self.suffix_ids)], vector)

    def attended_words(
        self, text: str, tokens: Tokens, passage: tuple[int, int], query: Tensor, count: int
    ) -> list[AttendedWord]:
        """The `count` words with the most attention from a passage, in the last layer, mean over heads.

            a_j = Σ_i w_i · mean_h P_h[i, j],   w_i ∝ max(0, cos(query, state_i)),   i in the passage

        so passage tokens similar to the query weigh most. A word's attention is the sum over its occurrences, reported at the
        occurrence with the most. Special tokens and punctuation are left out; shares are of the attention on words.

        Args:
            text, tokens: the text and the tokens of the pass, their spans in `text`.
            passage: range of tokens [first, last + 1).
            query: `(features,)` vector of the question.
        """
        calls: list[Observation] = []

        def keep_last(call: Observation) -> None:
            calls[:] = [call]

        with torch.no_grad(), use_pattern(self.model, self.pattern, backend=self.backend, observer=keep_last):
            states = self._hidden_states(tokens.ids)
        (last_call,) = calls
        start, stop = (t + len(self.prefix_ids) for t in passage)
        weights = torch.nn.functional.cosine_similarity(states[start:stop], query[None]).clamp(min=0)
        weights = weights / weights.sum().clamp(min=1e-12)
        received = _column_sums(last_call, self.pattern, start, stop, weights)[len(self.prefix_ids) :]
        return _rank_words(text, tokens, received, count)

    def _hidden_states(self, ids: Sequence[int]) -> Tensor:
        """`(n, features)` float32 last hidden states, special tokens included."""
        if not 0 < len(ids) <= self.max_tokens:
            raise ArgumentError(
                f"a stretch of {len(ids)} tokens cannot be read in one pass; between 1 and {self.max_tokens} can."
            )
        device = next(self.model.parameters()).device
        framed = torch.tensor([[*self.prefix_ids, *ids, *self.suffix_ids]], device=device)
        states: Tensor = self.model(input_ids=framed)[0][0]
        return states.float().cpu()


def _column_sums(call: Observation, pattern: Pattern, start: int, stop: int, weights: Tensor) -> Tensor:
    """`(n,)`: Σ_i weights[i] · mean_h P_h[start + i, j] for every key j, the attention that rows start … stop - 1 pay to it.

    The gradient of Σ_i weights[i] · out[i] with respect to v is Pᵀ · weights, so one backward pass of sparse attention gives
    all column sums without forming a row of P.
    """
    allowed = pattern if call.own == full() else call.own & pattern
    q, k = call.q[:, :, start:stop].detach(), call.k.detach()
    v = torch.zeros_like(k).requires_grad_()
    with torch.enable_grad():
        out = attention(q, k, v, allowed, scale=call.scale, q_offset=call.q_offset + start)
        assert isinstance(out, Tensor)
        out.backward(weights.to(out)[None, None, :, None].expand_as(out).contiguous() / q.shape[1])
    assert v.grad is not None
    sums: Tensor = v.grad[0, :, :, 0].sum(0).float().cpu()
    return sums


def _rank_words(text: str, tokens: Tokens, received: Tensor, count: int) -> list[AttendedWord]:
    """The `count` words with the largest sums of `received` `(n,)` over their tokens; occurrences are merged by case-folded
    form."""
    totals: dict[str, tuple[float, float, re.Match[str]]] = {}  # by form: (sum, largest occurrence, its match)
    first = 0
    for match in _WORD.finditer(text, tokens.spans[0][0], tokens.spans[-1][1]):
        while first < len(tokens) and tokens.spans[first][1] <= match.start():
            first += 1
        attention_on_word, t = 0.0, first
        while t < len(tokens) and tokens.spans[t][0] < match.end():
            attention_on_word += float(received[t])
            t += 1
        form = match[0].casefold()
        total, largest, occurrence = totals.get(form, (0.0, -1.0, match))
        if attention_on_word > largest:
            largest, occurrence = attention_on_word, match
        totals[form] = (total + attention_on_word, largest, occurrence)
    all_words = sum(total for total, _, _ in totals.values()) or 1.0
    ranked = sorted(totals.values(), key=lambda entry: -entry[0])[:count]
    return [AttendedWord(match[0], match.start(), match.end(), total / all_words) for total, _, match in ranked]
