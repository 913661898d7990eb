"""Which links a pattern lost, the heaviest first, and the words that stood at their ends.

A share of probability says how much was lost, not what. The heaviest links that a pattern leaves out are kept while the
probabilities pass by, a handful at any time, and are told in words where the tokenizer is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from farlight.analysis.loss.probabilities import Tile

__all__ = ["KEPT", "Lost", "LostBuilder", "LostLink", "of_each_head", "told", "words_of"]

# Of each head of a model so many of the heaviest lost links are kept, and so many at most are told.
KEPT = 8
_TOLD_OF_A_HEAD = 2


@dataclass(frozen=True)
class LostLink:
    """One link that full attention looks along and the pattern does not.

    `probability` is its share of the query's full attention; `query` and `key` are positions. `layer` and the words are there
    where they are known, `text` is the number of the text in its batch, or of the passage. `heads` counts the (layer, head) in
    which the pair is among the heaviest lost.
    """

    probability: float
    head: int
    query: int
    key: int
    text: int = 0
    layer: int | None = None
    query_word: str | None = None
    key_word: str | None = None
    heads: int = 1

    def __str__(self) -> str:
        ends = [
            f"{word!r} ({place})" if word is not None else str(place)
            for word, place in ((self.query_word, self.query), (self.key_word, self.key))
        ]
        layer = "" if self.layer is None else f"layer {self.layer} "
        return f"{ends[0]} no longer sees {ends[1]}: {self.probability:.1%} of its attention in {layer}head {self.head}"


@dataclass(frozen=True)
class Lost:
    """The heaviest links outside a pattern, over all texts, heads and rows, in falling order; 1-D tensors of one length.

    `probability` in the dtype of the measure, the others int64. Links of probability zero are not lost and not listed; of equal
    ones at the end of the list any may be there.
    """

    probability: Tensor
    text: Tensor
    head: Tensor
    query: Tensor
    key: Tensor

    def __len__(self) -> int:
        return self.probability.numel()

    def links(self, *, layer: int | None = None, words: Sequence[Sequence[str]] | None = None) -> tuple[LostLink, ...]:
        """As values. `words[text][position]` are the words of each text, from `words_of`."""
        out = []
        columns = (column.tolist() for column in (self.probability, self.text, self.head, self.query, self.key))
        for probability, text, head, query, key in zip(*columns, strict=True):
            link = LostLink(probability, head, query, key, text, layer)
            if words is not None:
                # A query before the text (a negative position) has no word.
                spoken = words[text][query] if 0 <= query < len(words[text]) else None
                link = replace(link, query_word=spoken, key_word=words[text][key])
            out.append(link)
        return tuple(out)


def of_each_head(links: Iterable[LostLink], count: int) -> list[LostLink]:
    """The heaviest links, heaviest first, `count` of any one head at most."""
    seen: Counter[tuple[int | None, int]] = Counter()
    out = []
    for link in sorted(links, key=lambda link: -link.probability):
        seen[link.layer, link.head] += 1
        if seen[link.layer, link.head] <= count:
            out.append(link)
    return out


def told(links: Iterable[LostLink], count: int) -> tuple[LostLink, ...]:
    """The `count` heaviest losses worth telling, of links that come from several heads, layers and texts.

    A pair of tokens that many heads lost is one loss told many times: it is told once, where it weighed most, with the number
    of heads. And a head that copies words would fill the list with its own: two of any head at most.
    """
    best: dict[tuple[int, int, int], LostLink] = {}
    heads: Counter[tuple[int, int, int]] = Counter()
    for link in links:
        pair = link.text, link.query, link.key
        heads[pair] += 1
        if pair not in best or link.probability > best[pair].probability:
            best[pair] = link
    once = (replace(link, heads=heads[pair]) for pair, link in best.items())
    return tuple(of_each_head(once, _TOLD_OF_A_HEAD)[:count])


class LostBuilder:
    """Keeps the `count` heaviest links outside a mask while tiles pass by: of all heads, or of each of `by_head` heads."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device, by_head: int | None = None) -> None:
        self.by_head = by_head is not None
        shape = (1 if by_head is None else by_head, count)
        self._probability = torch.zeros(shape, dtype=dtype, device=device)
        self._place = torch.zeros(4, *shape, dtype=torch.int64, device=device)

    def add(self, tile: Tile, mask: Tensor, q_offset: int) -> None:
        """`mask` is what the pattern and the base allow in this tile."""
        lost = tile.full.masked_fill(mask, 0.0).transpose(0, 1)
        if not lost.numel():
            return
        here = tile.heads if self.by_head else slice(0, 1)
        each = lost.reshape(here.stop - here.start, -1)
        held = self._probability[here]
        if not bool((each.amax(1) > held.amin(1)).any()):
            return
        found, at = each.topk(min(held.shape[1], each.shape[1]), dim=1)
        at += torch.arange(each.shape[0], device=at.device)[:, None] * each.shape[1]
        place = []
        for size in reversed(lost.shape):
            place.append(at % size)
            at = at.div(size, rounding_mode="floor")
        key, row, text, head = place
        starts = (tile.items.start, tile.heads.start, tile.rows.start + q_offset)
        new = torch.stack([text + starts[0], head + starts[1], row + starts[2], key])
        everything, places = torch.cat([held, found], 1), torch.cat([self._place[:, here], new], 2)
        order = everything.sort(dim=1, descending=True, stable=True).indices[:, : held.shape[1]]
        self._probability[here] = everything.gather(1, order)
        self._place[:, here] = places.gather(2, order.expand(4, -1, -1))

    def finish(self) -> Lost:
        probability = self._probability.flatten()
        order = probability.sort(descending=True, stable=True).indices[: int((probability > 0).sum())]
        return Lost(probability[order], *self._place.flatten(1)[:, order])


def words_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """For each token the word that it is part of, as the reader sees it; special tokens stand for themselves.

    Pieces are joined by the marks of the tokenizer's own kind: `##` at the start of a piece that goes on (WordPiece), or `Ġ`
    and `▁` at the start of one that begins a word (byte-level BPE, SentencePiece).
    """
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    special = set(tokenizer.all_special_tokens)
    marked = any(piece[:1] in ("Ġ", "▁") for piece in pieces)
    groups: list[list[int]] = []
    for place, piece in enumerate(pieces):
        goes_on = piece.startswith("##") or (marked and piece[:1] not in ("Ġ", "▁", "Ċ") and piece[:1].isalnum())
        alone = not groups or piece in special or pieces[groups[-1][-1]] in special
        if goes_on and not alone:
            groups[-1].append(place)
        else:
            groups.append([place])
    out = [""] * len(pieces)
    for group in groups:
        word = pieces[group[0]]
        if word not in special:
            word = tokenizer.decode([ids[place] for place in group]).strip() or word
        for place in group:
            out[place] = word
    return out
