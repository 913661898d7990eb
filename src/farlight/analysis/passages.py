"""A long text cut into passages of the model's own length, where full attention is available for comparison.

The text is tokenized once, as a whole, and cut at token boundaries; each passage is then framed by the special tokens that
the tokenizer puts around a text ([CLS] and [SEP], say).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.errors import ArgumentError

__all__ = ["FEWEST_TOKENS", "Passages", "cut_passages", "frame"]

# Below this length, shares and cosines depend on the ends of the passage more than on the pattern.
FEWEST_TOKENS = 32


@dataclass(frozen=True)
class Passages:
    """Passages as model inputs.

    ids: (passages, length) int64, special tokens included. tokens: length of the whole text without special tokens.
    starts[p]: index in the text of the first token of passage p.
    """

    ids: Tensor
    tokens: int
    starts: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Number of passages."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens in a passage, special tokens included."""
        return self.ids.shape[1]


def cut_passages(
    text: str, tokenizer: Any, length: int, count: int | None, *, spread: bool = False, stride: int | None = None
) -> Passages:
    """The first `count` passages of `length` tokens, special tokens included; fewer when the text is shorter; None: all.

    spread: take them evenly from the whole text instead. stride: tokens of the text from one start to the next; None: passages
    adjoin. A text shorter than one passage becomes one shorter passage. `tokenizer` is a Hugging Face tokenizer. Raises
    ArgumentError for a text of fewer than `FEWEST_TOKENS` tokens, a `length` with less room for text than that, or `count` or
    `stride` < 1.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before, after = frame(tokenizer)
    text_tokens = length - len(before) - len(after)
    if text_tokens < FEWEST_TOKENS:
        min_length = length - text_tokens + FEWEST_TOKENS
        raise ArgumentError(
            f"passages of {length} tokens leave {text_tokens} for the text; use a length of at least {min_length}."
        )
    if count is not None and count < 1:
        raise ArgumentError(f"passages = {count}: at least one is needed.")
    if len(ids) < FEWEST_TOKENS:
        raise ArgumentError(
            f"the text has {len(ids)} tokens; at least {FEWEST_TOKENS} are needed to say anything about a pattern."
        )
    step = text_tokens if stride is None else stride
    if step < 1:
        raise ArgumentError(f"stride = {stride}: passages start at least one token apart; the default is their length.")
    available = max(1, 1 + (len(ids) - text_tokens) // step)
    num_passages = available if count is None else min(count, available)
    starts = tuple(step * (p * available // num_passages if spread else p) for p in range(num_passages))
    framed = [before + ids[start : start + text_tokens] + after for start in starts]
    return Passages(torch.tensor(framed, dtype=torch.int64, device="cpu"), len(ids), starts)


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids before, ids after): the special tokens that the tokenizer puts around a text.

    Raises ArgumentError for a tokenizer that changes the text's tokens when it adds them.
    """
    bare = tokenizer("the", add_special_tokens=False)["input_ids"]
    framed = tokenizer("the")["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise ArgumentError(
        f"{type(tokenizer).__name__} rewrites a text when it adds its special tokens, so passages cannot be framed; "
        "use a tokenizer that adds them before and after the text."
    )
