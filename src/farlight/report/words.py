"""The text of a page with its token boundaries, compressed, cut off at `_MAX_CHARACTERS`.

Token boundaries are the tokenizer's offsets, so that the page shows the original text. A text that is cut off is marked by
`shown < tokens`, and the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from farlight.analysis.passages import frame
from farlight.report.packing import pack, pack_text

__all__ = ["Words", "words_of"]

# Compressed and in base64 they take about half as many bytes.
_MAX_CHARACTERS = 5_000_000


class Words:
    """A text and its tokens: token t is `text[ends[t - 1] : ends[t]]`, preceding space included.

    before, after: the special tokens that frame a passage.
    """

    def __init__(self, text: str, ends: np.ndarray[Any, Any], before: Sequence[str] = (), after: Sequence[str] = ()) -> None:
        self.text, self.ends = text, ends
        self.before, self.after = list(before), list(after)

    @property
    def count(self) -> int:
        """Number of tokens."""
        return int(self.ends.size)

    def __getitem__(self, token: int) -> str:
        start = int(self.ends[token - 1]) if token else 0
        return self.text[start : int(self.ends[token])]

    def to_page(self) -> dict[str, Any]:
        """Plain values for JSON: packed text, token lengths in UTF-16 units, framing tokens, and how many tokens fit."""
        shown = int(np.searchsorted(self.ends, _MAX_CHARACTERS, side="right"))
        ends = self.ends[:shown]
        text = self.text[: int(ends[-1]) if shown else 0]
        # JavaScript strings are UTF-16: characters beyond the basic plane have length 2.
        units = np.concatenate(([0], np.cumsum(1 + (np.array([ord(c) for c in text], dtype=np.int64) > 0xFFFF))))
        return {
            "content": pack_text(text),
            "lengths": pack(np.diff(units[ends], prepend=0)),
            "shown": shown,
            "tokens": self.count,
            "before": self.before,
            "after": self.after,
        }


def words_of(text: str, tokenizer: Any) -> Words:
    """The text split by a Hugging Face tokenizer; a slow one has no offsets, so its tokens are joined by spaces instead."""
    frame_tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in frame(tokenizer)]
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        ends = np.maximum.accumulate(ends) if ends.size else ends
        if ends.size:
            ends[-1] = len(text)
        return Words(text, ends, *frame_tokens)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return Words(" ".join(tokens), np.cumsum([len(token) + 1 for token in tokens]) - 1, *frame_tokens)
