"""Top losses: the links outside a pattern with the largest attention probability, and the words at their ends.

`LostLinkCollector` keeps a running top-k per head (or over all heads) while tiles of probabilities are computed, so memory is
O(count), not O(n²). `top_losses` reduces the links of many heads, layers and texts to a list for a reader: one entry per pair
of tokens, few per head. `words_of` maps token ids to the words they belong to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from farlight.analysis.loss.probabilities import Tile

__all__ = ["LINKS_PER_HEAD", "LostLink", "LostLinkCollector", "LostLinks", "heaviest_per_head", "top_losses", "words_of"]

# Heaviest lost links collected per head and layer of a model, and how many of one head a list for a reader may hold.
LINKS_PER_HEAD = 8
_REPORTED_PER_HEAD = 2


@dataclass(frozen=True)
class LostLink:
    """One link that has probability under full attention and is outside the pattern.

    Attributes:
        probability: full attention probability of key given query.
        head, query, key: query head, and positions of the two tokens.
        text: index in the batch, or of the passage.
        layer, query_word, key_word: None where unknown.
        heads: number of (layer, head) that list this pair among their heaviest lost links.
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
            f"{word!r} ({position})" if word is not None else str(position)
            for word, position in ((self.query_word, self.query), (self.key_word, self.key))
        ]
        layer = "" if self.layer is None else f"layer {self.layer} "
        return f"{ends[0]} no longer sees {ends[1]}: {self.probability:.1%} of its attention in {layer}head {self.head}"


@dataclass(frozen=True)
class LostLinks:
    """The heaviest links outside a pattern, in falling order of probability; 1-D tensors of one length.

    `probability` has the dtype of the probabilities (float32 or float64), the others are int64. Links of probability 0 are not
    listed. Among equal probabilities at the end of the list, which ones are listed is unspecified.
    """

    probability: Tensor
    text: Tensor
    head: Tensor
    query: Tensor
    key: Tensor

    def __len__(self) -> int:
        return self.probability.numel()

    def links(self, *, layer: int | None = None, words: Sequence[Sequence[str]] | None = None) -> tuple[LostLink, ...]:
        """The rows as `LostLink`s. `words[text][position]`: the words of each text, from `words_of`."""
        links = []
        columns = (column.tolist() for column in (self.probability, self.text, self.head, self.query, self.key))
        for probability, text, head, query, key in zip(*columns, strict=True):
            link = LostLink(probability, head, query, key, text, layer)
            if words is not None:
                # A query at a negative position stands before the text and has no word.
                query_word = words[text][query] if 0 <= query < len(words[text]) else None
                link = replace(link, query_word=query_word, key_word=words[text][key])
            links.append(link)
        return tuple(links)


def heaviest_per_head(links: Iterable[LostLink], count: int) -> list[LostLink]:
    """Links in falling order of probability, at most `count` of each (layer, head)."""
    per_head: Counter[tuple[int | None, int]] = Counter()
    heaviest = []
    for link in sorted(links, key=lambda link: -link.probability):
        per_head[link.layer, link.head] += 1
        if per_head[link.layer, link.head] <= count:
            heaviest.append(link)
    return heaviest


def top_losses(links: Iterable[LostLink], count: int) -> tuple[LostLink, ...]:
    """The `count` heaviest distinct losses among links of several heads, layers and texts.

    A (text, query, key) lost by many heads is listed once, with its largest probability and the number of heads. At most two
    links
    of one head are listed: otherwise a single head that copies tokens would fill the list.
    """
    heaviest: dict[tuple[int, int, int], LostLink] = {}
    heads: Counter[tuple[int, int, int]] = Counter()
    for link in links:
        pair = link.text, link.query, link.key
        heads[pair] += 1
        if pair not in heaviest or link.probability > heaviest[pair].probability:
            heaviest[pair] = link
    distinct = (replace(link, heads=heads[pair]) for pair, link in heaviest.items())
    return tuple(heaviest_per_head(distinct, _REPORTED_PER_HEAD)[:count])


class LostLinkCollector:
    """A running top-`count` of the probabilities outside a mask, over tiles.

    One list for all heads, or with `num_heads` one list per head. State: `(lists, count)` probabilities, and the (text, head,
    query, key) of each as `(4, lists, count)` int64.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device, num_heads: int | None = None) -> None:
        self.per_head = num_heads is not None
        shape = (1 if num_heads is None else num_heads, count)
        self._probability = torch.zeros(shape, dtype=dtype, device=device)
        self._index = torch.zeros(4, *shape, dtype=torch.int64, device=device)

    def add(self, tile: Tile, mask: Tensor, row_lost: Tensor, q_offset: int) -> None:
        """Add a tile.

        Args:
            mask: the pairs that pattern and base allow, broadcastable to `tile.probability`.
            row_lost: `(B', H', rows)`, the largest probability outside the mask in each row.
            q_offset: position of the first query.

        Of each list that gains a link, the `count` rows with the largest lost probabilities hold the tile's `count` heaviest
        links; only these rows are searched.
        """
        if not row_lost.numel():
            return
        first = tile.heads.start if self.per_head else 0
        of_lists = row_lost.transpose(0, 1).reshape(row_lost.shape[1] if self.per_head else 1, -1)
        count, tile_lists = self._probability.shape[1], slice(first, first + of_lists.shape[0])
        gaining = (of_lists.amax(1) > self._probability[tile_lists].amin(1)).nonzero().squeeze(1)
        if not gaining.numel():
            return
        rows = of_lists[gaining].topk(min(count, of_lists.shape[1]), dim=1).indices
        if self.per_head:
            rows = rows + (gaining * of_lists.shape[1])[:, None]
        self._merge(gaining + first, *_heaviest_in_rows(tile, mask, rows, count, q_offset))

    def _merge(self, lists: Tensor, probability: Tensor, index: Tensor) -> None:
        """Merge candidates into the lists `(n,)`: probabilities `(n, m)`, and `(4, n, m)` text, head, query and key."""
        count = self._probability.shape[1]
        merged = torch.cat([self._probability[lists], probability], 1)
        merged_index = torch.cat([self._index[:, lists], index], 2)
        order = merged.sort(dim=1, descending=True, stable=True).indices[:, :count]
        self._probability[lists] = merged.gather(1, order)
        self._index[:, lists] = merged_index.gather(2, order.expand(4, -1, -1))

    def finish(self) -> LostLinks:
        """All lists as one, in falling order of probability."""
        probability = self._probability.flatten()
        order = probability.sort(descending=True, stable=True).indices[: int((probability > 0).sum())]
        return LostLinks(probability[order], *self._index.flatten(1)[:, order])


def _heaviest_in_rows(tile: Tile, mask: Tensor, rows: Tensor, count: int, q_offset: int) -> tuple[Tensor, Tensor]:
    """The `count` largest probabilities outside the mask in each set of rows: `(n, m)`, and `(4, n, m)` text, head, query, key.

    rows: `(n, r)` int64, indices into the tile's (head, text, row) in that order; m = count, or all pairs of r rows.
    """
    texts, _, num_rows, keys = tile.probability.shape
    row, text, head = rows % num_rows, rows // num_rows % texts, rows // (num_rows * texts)
    allowed = mask.expand(tile.probability.shape)[text, head, row]
    lost = tile.probability[text, head, row].masked_fill_(allowed, 0.0).flatten(1)  # (n, r * keys)
    probability, flat = lost.topk(min(count, lost.shape[1]), dim=1)
    text, head, row = (place.gather(1, flat // keys) for place in (text, head, row))
    coordinates = text + tile.items.start, head + tile.heads.start, row + tile.rows.start + q_offset, flat % keys
    return probability, torch.stack(coordinates)


def words_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """For each token the word that contains it, as in the text; special tokens map to themselves.

    Word boundaries follow the tokenizer's marks: `##` begins a continuation piece (WordPiece), `Ġ` and `▁` begin a word
    (byte-level BPE, SentencePiece).
    """
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    special = set(tokenizer.all_special_tokens)
    marked = any(piece[:1] in ("Ġ", "▁") for piece in pieces)
    groups: list[list[int]] = []

    # Byte-level pieces spell other characters than ASCII in letters; half of such a character decodes to U+FFFD.
    texts = [piece if piece.isascii() else tokenizer.convert_tokens_to_string([piece]) for piece in pieces]

    def is_letter(character: str) -> bool:
        return character.isalnum() or character == "\ufffd"

    for index, piece in enumerate(pieces):
        continues = piece.startswith("##") or (
            marked
            and piece[:1] not in ("Ġ", "▁", "Ċ")
            and is_letter(texts[index][:1])
            and is_letter(texts[max(0, index - 1)][-1:])
        )
        starts_group = not groups or piece in special or pieces[groups[-1][-1]] in special
        if continues and not starts_group:
            groups[-1].append(index)
        else:
            groups.append([index])
    words = [""] * len(pieces)
    for group in groups:
        word = pieces[group[0]]
        if word not in special:
            word = tokenizer.decode([ids[index] for index in group]).strip() or word
        for index in group:
            words[index] = word
    return words
