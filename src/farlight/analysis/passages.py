"""A long text, cut into passages that a model can read with full attention.

What a pattern loses is judged where full attention is still possible: in passages of the model's own length. The text
is tokenized once, as a whole, and cut at token boundaries; each passage is then framed by the tokens that the model
expects at its ends ([CLS] and [SEP], say).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.errors import ArgumentError

__all__ = ["FEWEST_TOKENS", "Passages", "cut_passages", "frame"]

# Below this, shares and cosines say more about the ends of the text than about the pattern.
FEWEST_TOKENS = 32


@dataclass(frozen=True)
class Passages:
    """`ids` is `(passages, length)` int64, framed; `tokens` counts the whole text, unframed; passage p begins, without its
    frame, at token `starts[p]` of the text.
    """

    ids: Tensor
    tokens: int
    starts: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]


def cut_passages(text: str, tokenizer: Any, length: int, count: int | None, *, spread: bool = False) -> Passages:
    """The first `count` passages of `length` tokens each, frame included; fewer when the text ends before; None: all.

    With `spread` they are taken evenly from the whole text instead. A text too short for one whole passage becomes one
    shorter passage. `tokenizer` is a Hugging Face tokenizer. Raises ArgumentError when the text has fewer than
    `FEWEST_TOKENS` tokens, or `length` leaves no room for them.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before, after = frame(tokenizer)
    room = length - len(before) - len(after)
    if room < FEWEST_TOKENS:
        least = length - room + FEWEST_TOKENS
        raise ArgumentError(f"passages of {length} tokens leave {room} for the text; use a length of at least {least}.")
    if count is not None and count < 1:
        raise ArgumentError(f"passages = {count}: at least one is needed.")
    if len(ids) < FEWEST_TOKENS:
        raise ArgumentError(
            f"the text has {len(ids)} tokens; at least {FEWEST_TOKENS} are needed to say anything about a pattern."
        )
    whole = max(1, len(ids) // room)
    wanted = whole if count is None else min(count, whole)
    starts = tuple(room * (p * whole // wanted if spread else p) for p in range(wanted))
    framed = [before + ids[start : start + room] + after for start in starts]
    return Passages(torch.tensor(framed, dtype=torch.int64, device="cpu"), len(ids), starts)


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = tokenizer("the", add_special_tokens=False)["input_ids"]
    framed = tokenizer("the")["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise ArgumentError(
        f"{type(tokenizer).__name__} rewrites a text when it adds its special tokens, so passages cannot be framed; "
        "use a tokenizer that adds them before and after the text."
    )
