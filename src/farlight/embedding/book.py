"""Libraries of books: chapters split into passes and passages, encoded once, and searched by a question's vector.

A *chapter part* is the token range that one forward pass encodes: a whole chapter, or a piece of one that is longer than the
model's positions. A *passage* is a token range within a part, made of whole sentences. Every part and every passage has a unit
vector; search is a matrix-vector product and a top-k.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.embedding.chapters import Chapter, sentences, split_chapters
from farlight.embedding.reading import AttendedWord, Embedder, Tokens
from farlight.errors import ArgumentError

__all__ = [
    "ChapterPart", "EncodedDocument", "Library", "PassageHit", "SearchResult", "document_parts", "encode_document",
    "read_books", "split_parts",
]  # fmt: skip


@dataclass(frozen=True)
class ChapterPart:
    """The tokens of one forward pass and the passages in it.

    Attributes:
        book: index of the book.
        title: the chapter's title, with "(1/2)" where a chapter takes several passes.
        tokens: the tokens of the pass; their spans count characters of the whole book.
        passages: ranges of these tokens [first, last + 1).
    """

    book: int
    title: str
    tokens: Tokens
    passages: list[tuple[int, int]]

    def span(self, passage: int) -> tuple[int, int]:
        """The characters (start, stop) of a passage in the book."""
        first, last = self.passages[passage]
        return self.tokens.spans[first][0], self.tokens.spans[last - 1][1]


@dataclass(frozen=True)
class PassageHit:
    """A passage that a search returned: indices of its part and of the passage in it, cosine, characters in the book."""

    part: int
    passage: int
    score: float
    start: int
    stop: int


@dataclass(frozen=True)
class SearchResult:
    """Passages and chapter parts in falling order of cosine; parts as (index, cosine)."""

    passages: list[PassageHit]
    chapters: list[tuple[int, float]]


@dataclass(frozen=True)
class Library:
    """Encoded books.

    Attributes:
        names, texts: of the books.
        parts: all chapter parts.
        chapter_vectors: `(parts, features)` float32 unit vectors.
        passage_vectors: `(passages, features)` float32 unit vectors.
        owners: for each passage vector (part, passage within the part).
        seconds: wall time of encoding.
    """

    names: list[str]
    texts: list[str]
    parts: list[ChapterPart]
    chapter_vectors: Tensor
    passage_vectors: Tensor
    owners: list[tuple[int, int]]
    seconds: float

    def find(self, query: Tensor, count: int) -> SearchResult:
        """The `count` passages and chapter parts with the largest cosine to the unit vector `query` `(features,)`."""
        similarity = self.passage_vectors @ query
        top = similarity.topk(min(count, similarity.numel()))
        hits = []
        for score, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            part, passage = self.owners[index]
            hits.append(PassageHit(part, passage, score, *self.parts[part].span(passage)))
        similarity = self.chapter_vectors @ query
        top = similarity.topk(min(count, similarity.numel()))
        return SearchResult(hits, list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))

    def attended_words(self, embedder: Embedder, hit: PassageHit, query: Tensor, count: int) -> list[AttendedWord]:
        """`Embedder.attended_words` of a passage. Encodes its chapter part again: attention is not stored."""
        part = self.parts[hit.part]
        return embedder.attended_words(self.texts[part.book], part.tokens, part.passages[hit.passage], query, count)


def split_parts(
    embedder: Embedder, text: str, chapter: Chapter, title: str, book: int, passage_tokens: int
) -> list[ChapterPart]:
    """The parts of a chapter: one, or several where it has more tokens than the model's positions; none without tokens.

    Passages hold whole sentences of at most `passage_tokens` tokens together; a longer sentence is cut. Parts hold whole
    passages.
    """
    encoded = embedder.tokens(text[chapter.start : chapter.stop])
    spans = [(start + chapter.start, stop + chapter.start) for start, stop in encoded.spans]
    if not spans:
        return []
    sentence_ends = _sentence_ends(spans, sentences(text, chapter.start, chapter.stop))
    passages = _pack_sentences(sentence_ends, min(passage_tokens, embedder.max_tokens))
    groups: list[list[tuple[int, int]]] = [[]]  # the passages of each part
    for passage in passages:
        if groups[-1] and passage[1] - groups[-1][0][0] > embedder.max_tokens:
            groups.append([])
        groups[-1].append(passage)
    parts = []
    for number, group in enumerate(groups, 1):
        first, last = group[0][0], group[-1][1]
        part_title = title if len(groups) == 1 else f"{title} ({number}/{len(groups)})".strip()
        tokens = Tokens(encoded.ids[first:last], spans[first:last])
        parts.append(ChapterPart(book, part_title, tokens, [(start - first, stop - first) for start, stop in group]))
    return parts


def _pack_sentences(ends: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """Consecutive token ranges of at most `max_tokens` that end at sentence ends where possible. `ends`: rising token
    indices."""
    passages: list[tuple[int, int]] = []
    begin = 0
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        while end - begin > max_tokens:
            passages.append((begin, begin + max_tokens))
            begin += max_tokens
        if following is None or following - begin > max_tokens:
            passages.append((begin, end))
            begin = end
    return [passage for passage in passages if passage[1] > passage[0]]


def _sentence_ends(spans: Sequence[tuple[int, int]], sentence_spans: Sequence[tuple[int, int]]) -> list[int]:
    """For each sentence, last token + 1; tokens after the last sentence belong to it."""
    ends, token = [], 0
    for _, stop in sentence_spans:
        while token < len(spans) and spans[token][0] < stop:
            token += 1
        ends.append(token)
    return [*ends[:-1], len(spans)]


@dataclass(frozen=True)
class EncodedDocument:
    """The parts of one text with their unit vectors: chapters `(parts, features)`, passages `(passages, features)`."""

    parts: list[ChapterPart]
    chapters: Tensor
    passages: Tensor


def document_parts(
    embedder: Embedder, name: str, text: str, *, passage: int, heading: str | None, number: int = 0
) -> list[ChapterPart]:
    """The parts of all chapters of a text. Raises ArgumentError where it has no words."""
    parts = [
        part
        for chapter in split_chapters(text, heading)
        for part in split_parts(embedder, text, chapter, chapter.title or name, number, passage)
    ]
    if not parts:
        raise ArgumentError(f"text {name!r} holds no chapter with words in it; give a text, or another --heading.")
    return parts


def encode_document(
    embedder: Embedder, name: str, text: str, *, passage: int = 128, heading: str | None = None
) -> EncodedDocument:
    """Encode one text, a forward pass for each part. Raises ArgumentError where it has no words."""
    parts = document_parts(embedder, name, text, passage=passage, heading=heading)
    encodings = [embedder.read(part.tokens.ids) for part in parts]
    passages = [encoding.passages(part.passages) for encoding, part in zip(encodings, parts, strict=True)]
    return EncodedDocument(parts, torch.stack([encoding.vector for encoding in encodings]), torch.cat(passages))


def read_books(
    embedder: Embedder,
    books: Sequence[tuple[str, str]],
    *,
    passage: int = 128,
    heading: str | None = None,
    start: Callable[[int], None] = lambda parts: None,
    step: Callable[[str], None] = lambda title: None,
) -> Library:
    """Encode books, given as (name, text), one forward pass for each chapter part.

    Args:
        passage: most tokens of a passage.
        heading: regular expression of headings (see `split_chapters`).
        start: called once with the number of passes; `step`: called with the part's title before each pass.

    Raises ArgumentError for a book without words, or without books.
    """
    if passage < 1:
        raise ArgumentError(f"passages of {passage} tokens cannot be; use at least 1.")
    parts: list[ChapterPart] = []
    for number, (name, text) in enumerate(books):
        parts += document_parts(embedder, name, text, passage=passage, heading=heading, number=number)
    if not parts:
        raise ArgumentError("no text was given; give at least one.")
    start(len(parts))
    start_time = time.perf_counter()
    chapters, passages, owners = [], [], []
    for number, part in enumerate(parts):
        step(part.title)
        encoding = embedder.read(part.tokens.ids)
        chapters.append(encoding.vector)
        passages.append(encoding.passages(part.passages))
        owners += [(number, i) for i in range(len(part.passages))]
    seconds = time.perf_counter() - start_time
    names, texts = [name for name, _ in books], [text for _, text in books]
    return Library(names, texts, parts, torch.stack(chapters), torch.cat(passages), owners, seconds)
