"""Cutting a book where its author did: into chapters, and into passages of whole sentences.

Everything here is about characters; tokens come later. A passage ends where a sentence does, so that what a search
shows can be read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from farlight.errors import ArgumentError

__all__ = ["HEADING", "Chapter", "sentences", "split_chapters"]

_WORDS = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
    "|twenty|thirty|forty|fifty|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last"
)
_NUMBER = rf"(?:[ivxlcdm]+|\d+|(?:the[ \t]+)?(?:{_WORDS})(?:[ -](?:{_WORDS}))?)"
# A line of its own: "CHAPTER IV", "Book Two: 1806", "SECOND EPILOGUE", or a heading of Markdown.
HEADING = (
    rf"(?im)^[ \t]*(?:(?:chapter|book|part|volume|canto|letter|act|scene)[ \t]+{_NUMBER}(?:[ \t]*[.:—–-][^\n]{{0,70}})?"
    rf"|(?:(?:{_WORDS})[ \t]+)?(?:prologue|epilogue|preface|foreword|introduction|afterword)(?:[ \t]*[.:—–-][^\n]{{0,70}})?"
    r"|\#{1,3}[ \t]+\S[^\n]*?)[ \t\r]*$"
)
# What stands before a heading: an empty line, so that a line of prose that happens to begin so is none.
_EMPTY_LINE = re.compile(r"\n[ \t\r]*\n[ \t\r]*\Z")
# A sentence ends at . ! ? … and the quotation marks or brackets that follow, before white space; or at an empty line.
_ENDS = re.compile(r"(?:[.!?…]+[\"”’»)\]]*(?=\s))|\n[ \t]*\n")
# Not ends of sentences, though a point stands there.
_SHORT = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Messrs|No|Vol|vs|etc|e\.g|i\.e)|\b[A-Z])\.$")


@dataclass(frozen=True)
class Chapter:
    """`text[start:stop]` of a book, its heading left out."""

    title: str
    start: int
    stop: int


def split_chapters(text: str, heading: str | None = None) -> list[Chapter]:
    """The chapters of a text, in order; one without a title where there is no heading.

    `heading` is a regular expression that finds headings; None means lines such as "CHAPTER IV" or "# A Markdown title". A
    heading that only another kind of heading follows ("BOOK TWO", then "CHAPTER I") becomes part of the titles after it.
    Headings with nothing under them (a table of contents) are no chapters. Raises ArgumentError for a bad expression.

    >>> [chapter.title for chapter in split_chapters("BOOK ONE\\n\\nCHAPTER I\\n\\nIt began.\\n\\nCHAPTER II\\n\\nIt ended.")]
    ['BOOK ONE, CHAPTER I', 'BOOK ONE, CHAPTER II']
    """
    try:
        found = list(re.finditer(HEADING if heading is None else heading, text))
    except (re.error, OverflowError, RecursionError) as error:
        raise ArgumentError(f"heading {heading!r} is not a regular expression: {error}; e.g. '(?m)^CHAPTER .*$'.") from None
    if any(match.start() == match.end() for match in found):
        raise ArgumentError(
            f"heading {heading!r} matches the empty text, so that everything would be a heading; make it longer."
        )
    if heading is None:
        found = list(_apart(text, found))
    titles = [" ".join(match[0].strip().lstrip("#").split()) for match in found]
    bodies = [(match.end(), after.start()) for match, after in itertools.pairwise(found)]
    if found:
        bodies.append((found[-1].end(), len(text)))
    chapters, above = [], ""
    if text[: found[0].start() if found else None].strip():
        chapters.append(Chapter("", 0, found[0].start() if found else len(text)))
    for place, (title, (start, stop)) in enumerate(zip(titles, bodies, strict=True)):
        if text[start:stop].strip():
            chapters.append(Chapter(f"{above}, {title}" if above else title, start, stop))
        elif place + 1 < len(titles) and _kind(titles[place + 1]) != _kind(title):
            above = title
    return chapters


def _apart(text: str, found: list[re.Match[str]]) -> Iterator[re.Match[str]]:
    """Those headings that follow an empty line, another heading or nothing."""
    end = 0
    for match in found:
        between = text[end : match.start()]
        if not between.strip() or _EMPTY_LINE.search(between):
            yield match
            end = match.end()


def _kind(title: str) -> str:
    return title.split()[0].casefold()


def sentences(text: str, start: int = 0, stop: int | None = None) -> Sequence[tuple[int, int]]:
    """The character spans of the sentences of `text[start:stop]`, without the white space between them.

    >>> text = "Mr. Smith left. “Why?” she asked."
    >>> [text[a:b] for a, b in sentences(text)]
    ['Mr. Smith left.', '“Why?” she asked.']
    """
    stop = len(text) if stop is None else stop
    spans, begin = [], start
    for match in _ENDS.finditer(text, start, stop):
        end = match.end()
        if _SHORT.search(text, max(begin, end - 12), end):
            continue
        after = text[end : end + 2].lstrip()
        if after[:1].islower():  # “Why?” she asked.
            continue
        spans.append((begin, end))
        begin = end
    spans.append((begin, stop))
    trimmed = []
    for a, b in spans:
        piece = text[a:b]
        if piece.strip():
            trimmed.append((a + len(piece) - len(piece.lstrip()), a + len(piece.rstrip())))
    return trimmed
