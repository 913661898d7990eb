"""Chapters and sentences of a plain text, as character spans, by regular expressions.

Headings are lines of their own that look like one ("CHAPTER IV", "# Title") and follow an empty line; sentences end at . ! ? …
or an empty line, except after abbreviations. No tokenizer is involved: `book.split_parts` maps the spans to tokens.
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
# A whole line: "CHAPTER IV", "Book Two: 1806", "SECOND EPILOGUE", or a Markdown heading.
HEADING = (
    rf"(?im)^[ \t]*(?:(?:chapter|book|part|volume|canto|letter|act|scene)[ \t]+{_NUMBER}(?:[ \t]*[.:—–-][^\n]{{0,70}})?"
    rf"|(?:(?:{_WORDS})[ \t]+)?(?:prologue|epilogue|preface|foreword|introduction|afterword)(?:[ \t]*[.:—–-][^\n]{{0,70}})?"
    r"|\#{1,3}[ \t]+\S[^\n]*?)[ \t\r]*$"
)
# Required before a heading: excludes lines of prose that begin with a heading's words.
_EMPTY_LINE = re.compile(r"\n[ \t\r]*\n[ \t\r]*\Z")
# . ! ? … with the quotation marks or brackets that follow, before white space; or an empty line.
_SENTENCE_END = re.compile(r"(?:[.!?…]+[\"”’»)\]]*(?=\s))|\n[ \t]*\n")
# Abbreviations and initials, whose full stop does not end a sentence.
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Messrs|No|Vol|vs|etc|e\.g|i\.e)|\b[A-Z])\.$")


@dataclass(frozen=True)
class Chapter:
    """A chapter: its title and its text, `text[start:stop]` of the book, without the heading."""

    title: str
    start: int
    stop: int


def split_chapters(text: str, heading: str | None = None) -> list[Chapter]:
    """The chapters of a text, in order; a text before the first heading, or without headings, is a chapter without a title.

    `heading`: a regular expression of headings; None means `HEADING`. A heading without text directly before one of another
    kind ("BOOK TWO", then "CHAPTER I") prefixes the titles after it. Other headings without text (a table of contents) are
    dropped. Raises ArgumentError for an expression that does not compile or matches the empty text.

    >>> [chapter.title for chapter in split_chapters("BOOK ONE\\n\\nCHAPTER I\\n\\nIt began.\\n\\nCHAPTER II\\n\\nIt ended.")]
    ['BOOK ONE, CHAPTER I', 'BOOK ONE, CHAPTER II']
    """
    try:
        matches = list(re.finditer(HEADING if heading is None else heading, text))
    except (re.error, OverflowError, RecursionError) as error:
        raise ArgumentError(f"heading {heading!r} is not a regular expression: {error}; e.g. '(?m)^CHAPTER .*$'.") from None
    if any(match.start() == match.end() for match in matches):
        raise ArgumentError(
            f"heading {heading!r} matches the empty text, so that everything would be a heading; make it longer."
        )
    if heading is None:
        matches = list(_after_empty_lines(text, matches))
    titles = [" ".join(match[0].strip().lstrip("#").split()) for match in matches]
    bodies = [(match.end(), following.start()) for match, following in itertools.pairwise(matches)]
    if matches:
        bodies.append((matches[-1].end(), len(text)))
    first_heading = matches[0].start() if matches else len(text)
    chapters = [Chapter("", 0, first_heading)] if text[:first_heading].strip() else []
    enclosing = ""
    for index, (title, (start, stop)) in enumerate(zip(titles, bodies, strict=True)):
        if text[start:stop].strip():
            chapters.append(Chapter(f"{enclosing}, {title}" if enclosing else title, start, stop))
        elif index + 1 < len(titles) and _heading_word(titles[index + 1]) != _heading_word(title):
            enclosing = title
    return chapters


def _after_empty_lines(text: str, matches: list[re.Match[str]]) -> Iterator[re.Match[str]]:
    """The headings preceded by an empty line, by another heading, or by nothing."""
    end = 0
    for match in matches:
        between = text[end : match.start()]
        if not between.strip() or _EMPTY_LINE.search(between):
            yield match
            end = match.end()


def _heading_word(title: str) -> str:
    """The first word of a title ("chapter", "book"), which tells headings of different kinds apart."""
    return title.split()[0].casefold()


def sentences(text: str, start: int = 0, stop: int | None = None) -> Sequence[tuple[int, int]]:
    """Character spans (start, stop) of the sentences of `text[start:stop]`, surrounding white space removed.

    >>> text = "Mr. Smith left. “Why?” she asked."
    >>> [text[a:b] for a, b in sentences(text)]
    ['Mr. Smith left.', '“Why?” she asked.']
    """
    stop = len(text) if stop is None else stop
    spans, begin = [], start
    for match in _SENTENCE_END.finditer(text, start, stop):
        end = match.end()
        if _ABBREVIATION.search(text, max(begin, end - 12), end):
            continue
        following = text[end : end + 2].lstrip()
        if following[:1].islower():  # “Why?” she asked.
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
