"""The text that a page shows, token by token, within a page's size.

The whole text is carried when it fits, compressed; a longer one ends where the budget does, and the page says so. Tokens
are cut by the tokenizer's own offsets, so that what stands on the page is what stands in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from farlight.analysis.passages import frame
from farlight.report.packing import pack, pack_text

__all__ = ["Words", "words_of"]

# Characters of text: compressed and in base64 they make about half as many bytes of page.
_MOST_CHARACTERS = 5_000_000


class Words:
    """A text and where each of its tokens ends: token t is `text[ends[t - 1] : ends[t]]`, the space before it included."""

    def __init__(self, text: str, ends: np.ndarray[Any, Any], before: Sequence[str] = (), after: Sequence[str] = ()) -> None:
        self.text, self.ends = text, ends
        self.before, self.after = list(before), list(after)

    @property
    def count(self) -> int:
        return int(self.ends.size)

    def __getitem__(self, token: int) -> str:
        start = int(self.ends[token - 1]) if token else 0
        return self.text[start : int(self.ends[token])]

    def to_page(self) -> dict[str, Any]:
        """Plain values: the text packed, ends as differences, the tokens of the frame spelled out."""
        shown = int(np.searchsorted(self.ends, _MOST_CHARACTERS, side="right"))
        ends = self.ends[:shown]
        text = self.text[: int(ends[-1]) if shown else 0]
        # JavaScript counts UTF-16 units; characters beyond the first plane are two of them.
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
    """The words of a text by a fast Hugging Face tokenizer; one without offsets gives the tokens' own spelling."""
    ends_of_passages = [tokenizer.convert_ids_to_tokens(ids) for ids in frame(tokenizer)]
    if getattr(tokenizer, "is_fast", False):
        read = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        ends = np.array([end for _, end in read["offset_mapping"]], dtype=np.int64)
        ends = np.maximum.accumulate(ends) if ends.size else ends
        if ends.size:
            ends[-1] = len(text)
        return Words(text, ends, *ends_of_passages)
    spelled = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return Words(" ".join(spelled), np.cumsum([len(token) + 1 for token in spelled]) - 1, *ends_of_passages)
