"""Next-token loss of a causal language model, under full attention and under a pattern, on the same passages.

The loss is taken on the second half of each passage, where a token has at least half a passage of context: a pattern loses
nothing in the first tokens, which see everything. Differences are paired by passage, so that texts of different difficulty do
not widen the interval.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "LanguageLoss",
    "LanguageReader",
    "LossSums",
    "Prediction",
    "first_judged",
    "is_language_model",
    "logit_rows",
    "paired_interval",
]

# Elements of the largest matrix of logits that is formed at a time.
_MAX_LOGITS = 1 << 25
# Equal parts of the judged positions, for the loss by position.
_PARTS = 8
# Predictions collected for a list, and how many of one token the list may hold.
_MAX_PREDICTIONS, _PER_TOKEN = 64, 2
# Tokens of text shown before a prediction.
_CONTEXT_TOKENS = 16


@dataclass(frozen=True)
class Prediction:
    """A token that the model predicts worse under a pattern.

    Attributes:
        passage, position: of the token. token: its id.
        loss_full, loss: nats under full attention and under the pattern.
        word, context: the word that contains the token, and the text before it; None without a tokenizer.
    """

    passage: int
    position: int
    token: int
    loss_full: float
    loss: float
    word: str | None = None
    context: str | None = None

    @property
    def label(self) -> str:
        """The word, its position and the text before it."""
        name = f"token {self.token}" if self.word is None else repr(self.word)
        context = "" if self.context is None else f" after {self.context!r}"
        return f"{name} ({self.position}){context}"

    def __str__(self) -> str:
        return f"{self.label}: {self.loss_full:.2f} nats with full attention, {self.loss:.2f} without"


@dataclass(frozen=True)
class LanguageLoss:
    """Next-token loss of one pattern, in nats per token, means over the judged tokens of all passages.

    Attributes:
        loss, loss_full: under the pattern and under full attention.
        interval: 95 % interval of loss - loss_full, from the differences of the passages (Student's t); None for one passage.
        by_position: (first position, end, loss, loss_full) of equal parts of the judged positions.
        suffered: the predictions that lost most.
    """

    loss: float
    loss_full: float
    interval: tuple[float, float] | None
    by_position: tuple[tuple[int, int, float, float], ...] = ()
    suffered: tuple[Prediction, ...] = ()

    @property
    def lost(self) -> float:
        """loss - loss_full."""
        return self.loss - self.loss_full

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def perplexity_full(self) -> float:
        """exp(loss_full)."""
        return math.exp(min(self.loss_full, 700.0))

    @property
    def lost_early(self) -> float:
        """loss - loss_full of the first part of the judged positions."""
        _, _, loss, full = self.by_position[0]
        return loss - full

    @property
    def lost_late(self) -> float:
        """loss - loss_full of the last part."""
        _, _, loss, full = self.by_position[-1]
        return loss - full

    def named(self, ids: Tensor, tokenizer: Any, words: Sequence[Sequence[str]] | None) -> LanguageLoss:
        """With word and context of each prediction that suffered: token ids `(passages, N)`, `words[passage][position]`."""
        if words is None:
            return self

        def named(prediction: Prediction) -> Prediction:
            passage, word = ids[prediction.passage].tolist(), words[prediction.passage][prediction.position]
            start, stop = prediction.position, prediction.position + 1
            # The context ends before the first piece of the word.
            while start and tokenizer.decode(passage[start - 1 : stop]).strip() in word:
                start -= 1
            context = " ".join(tokenizer.decode(passage[max(0, start - _CONTEXT_TOKENS) : start]).split())
            return replace(prediction, word=word, context=context)

        return replace(self, suffered=tuple(named(prediction) for prediction in self.suffered))


def first_judged(tokens: int) -> int:
    """The first position whose prediction is judged, in passages of this many tokens: half of them."""
    return tokens // 2


def is_language_model(model: Any) -> bool:
    """Whether the model is one of transformers' causal language models, with its head."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        return False
    names = {base.__name__ for base in type(model).__mro__}
    return not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) and model.base_model is not model


class LanguageReader:
    """Last hidden states and token losses of one model, from one pass of it.

    Logits of a passage take tokens · vocabulary numbers, so where the head is a plain function of a token's last hidden state
    it is applied to a few tokens at a time. Whether it is, is asked of the model itself, on the last token of the first pass; a
    model that scales or caps its logits gives all of them at once instead.

    with_loss: False leaves the losses out, and for a model without a language head they are always left out.
    """

    def __init__(self, model: Any, with_loss: bool = True) -> None:
        self.model = model
        self._has_head = is_language_model(model)
        self.with_loss = with_loss and self._has_head
        # Assumed of a model that can give few logits, until its own logits say otherwise.
        self._head_is_plain = self.with_loss and "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """(last hidden states `(B, N, features)`, losses of the judged tokens `(B, N - N // 2)` float32 or None) of `ids`.

        Hidden states are float32, or float64 where the model gives float64.
        """
        ids = ids.to(self.model.device)
        with torch.no_grad():
            if not self.with_loss:
                body = self.model.base_model if self._has_head else self.model
                return _widened(body(**self._options(ids))[0]), None
            hidden, rows, head = self.read(ids)
            first = first_judged(ids.shape[1])
            losses = [_token_losses(row[first - 1 : -1], head, each) for row, each in zip(rows, ids[:, first:], strict=True)]
        return _widened(hidden), torch.stack(losses)

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor, Any]:
        """(last hidden states, rows `(B, N, …)`, the head that makes logits of them) of a language model, in the gradient mode
        of the caller. The rows are the hidden states, or the logits of all tokens and the head None (see the class).
        """
        options = self._options(ids)
        keep = {"logits_to_keep": 1} if self._head_is_plain else {}
        hidden, logits = self._run(options | keep)
        head = self.model.get_output_embeddings()
        if self._head_is_plain and not torch.allclose(head(hidden[:, -1:]).float(), logits.float(), rtol=1e-3, atol=1e-3):
            self._head_is_plain = False
            hidden, logits = self._run(options)
        return (hidden, hidden, head) if self._head_is_plain else (hidden, logits, None)

    def _options(self, ids: Tensor) -> dict[str, Any]:
        # Without this a causal model would fill a key/value cache that is never read.
        options: dict[str, Any] = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        return options | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _run(self, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(last hidden states, logits) of one pass."""
        states: list[Tensor] = []
        handle = self.model.base_model.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
        try:
            logits: Tensor = self.model(**options).logits
        finally:
            handle.remove()
        return states[0], logits


def _widened(hidden: Tensor) -> Tensor:
    return hidden if hidden.dtype == torch.float64 else hidden.float()


def logit_rows(width: int) -> int:
    """Tokens whose logits, `width` each, are formed at a time."""
    return max(1, _MAX_LOGITS // width)


def _token_losses(x: Tensor, head: Any, targets: Tensor) -> Tensor:
    """`(tokens,)`: cross-entropy of the logits `x`, or of head(x), computed in float32 for some tokens at a time."""
    width = x.shape[-1] if head is None else head.weight.shape[0]
    step = logit_rows(width)
    parts = []
    for rows, wanted in zip(x.split(step), targets.split(step), strict=True):
        logits = rows if head is None else head(rows)
        parts.append(functional.cross_entropy(logits.float(), wanted, reduction="none"))
    return torch.cat(parts)


def paired_interval(differences: Sequence[float] | Tensor) -> tuple[float, float] | None:
    """The 95 % interval of the mean of independent differences, mean ± t · s / √n (Student's t); None for fewer than two.

    >>> low, high = paired_interval([0.1, 0.2, 0.3])
    >>> round(low, 3), round(high, 3)
    (-0.048, 0.448)
    """
    values = torch.as_tensor(differences, dtype=torch.float64, device="cpu")
    if values.numel() < 2:
        return None
    mean = float(values.mean())
    half = _t_quantile(values.numel() - 1) * float(values.std()) / math.sqrt(values.numel())
    return mean - half, mean + half


# The 97.5 % quantile of Student's t for 1 … 10 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table by its expansion in 1 / degrees (Cornish and Fisher)."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


class LossSums:
    """Losses of one pattern over batches of passages: `add` each, then `finish`."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._full: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._first = 0

    def add(self, ids: Tensor, full: Tensor, losses: Tensor) -> None:
        """Add a batch: ids `(B, N)`, losses `(B, N - N // 2)` of the judged tokens under full attention and the pattern."""
        self._first = first_judged(ids.shape[1])
        self._targets.append(ids[:, self._first :].cpu())
        self._full.append(full.double().cpu())
        self._losses.append(losses.double().cpu())

    def finish(self, max_suffered: int = 0) -> LanguageLoss | None:
        """The result, listing at most `max_suffered` predictions; None where nothing was added."""
        if not self._losses:
            return None
        losses, full, targets = torch.cat(self._losses), torch.cat(self._full), torch.cat(self._targets)
        width, first = losses.shape[1], self._first
        edges = torch.linspace(0, width, min(_PARTS, width) + 1).long().tolist()
        by_position = tuple(
            (first + start, first + stop, float(losses[:, start:stop].mean()), float(full[:, start:stop].mean()))
            for start, stop in pairwise(edges)
        )
        return LanguageLoss(
            float(losses.mean()),
            float(full.mean()),
            paired_interval((losses - full).mean(1)),
            by_position,
            _suffered(losses, full, targets, first, max_suffered),
        )


def _suffered(losses: Tensor, full: Tensor, targets: Tensor, first: int, count: int) -> tuple[Prediction, ...]:
    """The `count` predictions that lost most, at most `_PER_TOKEN` of one token id."""
    increase = (losses - full).flatten()
    order = increase.topk(min(_MAX_PREDICTIONS, increase.numel())).indices.tolist()
    listed, per_token = [], Counter[int]()
    for index in order:
        passage, column = divmod(index, losses.shape[1])
        token = int(targets[passage, column])
        per_token[token] += 1
        if per_token[token] <= _PER_TOKEN and increase[index] > 0:
            values = float(full[passage, column]), float(losses[passage, column])
            listed.append(Prediction(passage, first + column, token, *values))
    return tuple(listed[:count])
