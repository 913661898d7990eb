"""Books, read chapter by chapter, and what is found in them: the road from files and a question to ranked passages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.embedding.chapters import Chapter, sentences, split_chapters
from farlight.embedding.reading import Embedder, Looked, Tokens
from farlight.errors import ArgumentError

__all__ = ["Found", "Library", "Part", "Place", "parts_of", "read_books"]


@dataclass(frozen=True)
class Part:
    """A stretch of a chapter that one pass reads; mostly a whole chapter.

    `tokens` are those of `text[chapter.start : chapter.stop]` that the pass reads, their spans counted in the whole book;
    `passages` are stretches of these tokens.
    """

    book: int
    title: str
    tokens: Tokens
    passages: list[tuple[int, int]]

    def span(self, passage: int) -> tuple[int, int]:
        """The characters of a passage."""
        first, last = self.passages[passage]
        return self.tokens.spans[first][0], self.tokens.spans[last - 1][1]


@dataclass(frozen=True)
class Place:
    """A passage: which part it is in, which of its passages, how near the question is (cosine), and its characters."""

    part: int
    passage: int
    score: float
    start: int
    stop: int


@dataclass(frozen=True)
class Found:
    """What a question found: passages and chapters, best first (chapters as (part, cosine))."""

    passages: list[Place]
    chapters: list[tuple[int, float]]


@dataclass(frozen=True)
class Library:
    """Books that have been read: a unit vector for every part and every passage."""

    names: list[str]
    texts: list[str]
    parts: list[Part]
    chapter_vectors: Tensor
    passage_vectors: Tensor
    owners: list[tuple[int, int]]
    seconds: float

    def find(self, query: Tensor, count: int) -> Found:
        """The `count` passages and chapters nearest to a unit vector."""
        near = self.passage_vectors @ query
        best = near.topk(min(count, near.numel()))
        places = [
            Place(part, passage, score, *self.parts[part].span(passage))
            for score, (part, passage) in zip(
                best.values.tolist(), (self.owners[i] for i in best.indices.tolist()), strict=True
            )
        ]
        whole = self.chapter_vectors @ query
        top = whole.topk(min(count, whole.numel()))
        return Found(places, list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))

    def looked_at(self, embedder: Embedder, place: Place, query: Tensor, count: int) -> list[Looked]:
        """The words that a passage looked at while it was read; the chapter is read once more."""
        part = self.parts[place.part]
        text = self.texts[part.book]
        return embedder.looked_at(text, part.tokens, part.passages[place.passage], query, count)


def parts_of(embedder: Embedder, text: str, chapter: Chapter, title: str, book: int, passage: int) -> list[Part]:
    """A chapter as the passes that read it: one, or several where it is longer than the model's positions.

    Passages are whole sentences, up to `passage` tokens together (a longer sentence is cut); passes hold whole passages.
    """
    found = embedder.tokens(text[chapter.start : chapter.stop])
    spans = [(a + chapter.start, b + chapter.start) for a, b in found.spans]
    if not spans:
        return []
    longest = min(passage, embedder.room)
    ends = _ends(spans, sentences(text, chapter.start, chapter.stop))
    passages: list[tuple[int, int]] = []
    begin = 0
    for end, after in zip(ends, [*ends[1:], None], strict=True):
        while end - begin > longest:
            passages.append((begin, begin + longest))
            begin += longest
        if after is None or after - begin > longest:
            passages.append((begin, end))
            begin = end
    passages = [stretch for stretch in passages if stretch[1] > stretch[0]]
    passes: list[list[tuple[int, int]]] = [[]]
    for stretch in passages:
        if passes[-1] and stretch[1] - passes[-1][0][0] > embedder.room:
            passes.append([])
        passes[-1].append(stretch)
    out = []
    for number, mine in enumerate(passes, 1):
        first, last = mine[0][0], mine[-1][1]
        shown = title if len(passes) == 1 else f"{title} ({number}/{len(passes)})".strip()
        tokens = Tokens(found.ids[first:last], spans[first:last])
        out.append(Part(book, shown, tokens, [(a - first, b - first) for a, b in mine]))
    return out


def _ends(spans: Sequence[tuple[int, int]], ranges: Sequence[tuple[int, int]]) -> list[int]:
    """For each sentence one more than its last token; the last one takes what is left."""
    ends, token = [], 0
    for _, stop in ranges:
        while token < len(spans) and spans[token][0] < stop:
            token += 1
        ends.append(token)
    return [*ends[:-1], len(spans)]


def read_books(
    embedder: Embedder,
    books: Sequence[tuple[str, str]],
    *,
    passage: int = 128,
    heading: str | None = None,
    start: Callable[[int], None] = lambda parts: None,
    step: Callable[[str], None] = lambda what: None,
) -> Library:
    """Read `(name, text)` books, a pass for each chapter.

    `start` is called once with the number of passes, `step` before each with a few words. Raises ArgumentError where nothing
    is to be read.
    """
    if passage < 1:
        raise ArgumentError(f"passages of {passage} tokens cannot be; use at least 1.")
    parts: list[Part] = []
    for number, (name, text) in enumerate(books):
        before = len(parts)
        for chapter in split_chapters(text, heading):
            parts += parts_of(embedder, text, chapter, chapter.title or name, number, passage)
        if len(parts) == before:
            raise ArgumentError(f"text {name!r} holds no chapter with words in it; give a text, or another --heading.")
    if not parts:
        raise ArgumentError("no text was given; give at least one.")
    start(len(parts))
    began = time.perf_counter()
    chapters, passages, owners = [], [], []
    for number, part in enumerate(parts):
        step(part.title)
        reading = embedder.read(part.tokens.ids)
        chapters.append(reading.vector)
        passages.append(reading.passages(part.passages))
        owners += [(number, i) for i in range(len(part.passages))]
    seconds = time.perf_counter() - began
    names, texts = [name for name, _ in books], [text for _, text in books]
    return Library(names, texts, parts, torch.stack(chapters), torch.cat(passages), owners, seconds)
