"""`farlight embed`: embeds documents chapter by chapter, one pass each, and ranks their passages against queries."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farlight.cli.numbers import count
from farlight.cli.progress import progress_bar
from farlight.errors import ArgumentError, FarlightError

if TYPE_CHECKING:
    from torch import Tensor

    from farlight.analysis.progress import Progress
    from farlight.cli.documents import Document
    from farlight.cli.ranks import Ranks
    from farlight.embedding.book import Library
    from farlight.embedding.reading import Embedder
    from farlight.patterns.expression import Pattern

__all__ = ["EXAMPLES", "embed_command"]

EXAMPLES = (
    "farlight embed book.txt --query 'Who was kind to the prisoner?'",
    "farlight embed letters/ 'notes/**/*.md' --index letters.index",
    "farlight embed --index letters.index --query 'a duel in the snow' --json",
    "cat pages.jsonl | farlight embed - --field body --save vectors.parquet",
)
_TRACE_STEP = "finding what was looked at"
_WORDS = 6
_MAX_NOTES = 10


def embed_command(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Texts, folders, globs, JSON lines (.jsonl), .parquet, or - for standard input."),
    ] = None,
    query: Annotated[
        list[str] | None, typer.Option("--query", metavar="TEXT", help="A question or a sentence. Repeat for several.")
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option("--index", help="A folder that keeps the vectors: work is resumed, queries read nothing again."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="An encoder: a folder or a Hugging Face name. Default: the packaged MiniLM."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", help='Who looks at whom. Default: "window(128) | global_tokens([0, -1])".'),
    ] = None,
    positions: Annotated[
        int,
        typer.Option("--positions", parser=count, metavar="TOKENS", help="In one pass; the model is lengthened to this."),
    ] = 8192,
    passage: Annotated[
        int | None,
        typer.Option(
            "--passage", parser=count, metavar="TOKENS", help="In a passage, at most; it ends with a sentence. Default: 128."
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", help="How many passages to show for each query.")] = 5,
    words: Annotated[
        int | None, typer.Option("--words", help=f"How many words that carried the attention to show. Default: {_WORDS}.")
    ] = None,
    heading: Annotated[
        str | None,
        typer.Option("--heading", help="A regular expression that finds headings. Default: CHAPTER IV and the like."),
    ] = None,
    field: Annotated[str, typer.Option("--field", help="The text's key in JSON lines, its column in parquet.")] = "text",
    save: Annotated[
        Path | None, typer.Option("--save", help="Also write the vectors: .npz, .npy, .jsonl or .parquet by its name.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="Which backend computes sparse attention.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Read documents chapter by chapter, each in one pass, and rank the passages that answer a query.

    A document that cannot be read is skipped with a note. Under torchrun the processes share the documents and write one index.
    """
    from farlight.cli.documents import find_files, read_documents
    from farlight.cli.embed_index import answer_of_index, read_into_index
    from farlight.cli.embed_report import show_answers
    from farlight.cli.inputs import read_patterns
    from farlight.cli.ranks import Ranks
    from farlight.kernels import registry

    # Cheap checks come before the model is loaded.
    parsed = None if pattern is None else read_patterns([pattern])[0]
    registry.check_name(backend)
    queries, shown_words = list(query or []), _WORDS if words is None else words
    _check_options(queries, files or [], index, save, words)
    _check_numbers({"positions": (positions, 8), "passage": (passage or 128, 1), "top": (top, 1), "words": (shown_words, 0)})
    paths = find_files(files or [])
    ranks = Ranks.of_torchrun()
    _check_ranks(ranks, index, paths)
    documents = read_documents(paths, field, None if ranks is None else ranks.claims())
    if index is None:
        documents = iter(list(documents))
    skipped: list[dict[str, str]] = []
    with progress_bar() as progress:
        embedder = _load(model, parsed, index, positions, backend, progress)
        vectors = [_query_vector(embedder, text) for text in queries]
        if index is not None:
            note = lambda name, error: _note(name, error, skipped)  # noqa: E731
            done = read_into_index(index, embedder, documents, len(paths), passage, heading, note, ranks, progress)
            if done is None:
                return
            opened, result = done
            asked = zip(queries, vectors, strict=True)
            result["queries"] = [answer_of_index(opened, text, vector, top) for text, vector in asked]
        else:
            texts = _readable(documents, skipped)
            result = _read_at_once(embedder, texts, queries, vectors, passage or 128, heading, top, shown_words, save, progress)
    result = {"model": embedder.name, "pattern": repr(embedder.pattern), "positions": positions} | result
    result["skipped"] = skipped
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show_answers(result)


def _load(
    model: str | None, pattern: Pattern | None, index: Path | None, positions: int, backend: str, progress: Progress
) -> Embedder:
    """The embedder that the options ask for; an index that exists says which model and pattern where they do not."""
    from farlight.embedding.index import Index
    from farlight.embedding.reading import Embedder
    from farlight.patterns import parse

    progress.start(["loading the model"])
    progress.step("loading the model")
    settings = None if index is None else Index.settings_of(index)
    if settings is not None:
        packaged = settings["model"] == "all-MiniLM-L6-v2"
        model = model if model is not None or packaged else settings["model"]
        pattern = parse(settings["pattern"]) if pattern is None else pattern
    return Embedder.load(model, pattern, positions=positions, backend=backend)


def _note(name: str, error: FarlightError, skipped: list[dict[str, str]]) -> None:
    """Note a document that is skipped in the result, and the first ones on standard error: a wrong --field fails every line."""
    skipped.append({"document": name, "why": str(error)})
    if len(skipped) <= _MAX_NOTES:
        print(f"farlight: skipped: {error}", file=sys.stderr, flush=True)
    elif len(skipped) == _MAX_NOTES + 1:
        print("farlight: skipped: more documents, which are counted below; --json lists them all.", file=sys.stderr, flush=True)


def _readable(documents: Iterator[Document], skipped: list[dict[str, str]]) -> list[tuple[str, str]]:
    """The documents that can be read. Raises the error of the only document, or where none can be read."""
    documents_list = list(documents)
    good = [(document.name, document.text) for document in documents_list if document.error is None]
    errors = [document for document in documents_list if document.error is not None]
    if errors and not good:
        assert errors[0].error is not None
        raise errors[0].error
    for document in errors:
        assert document.error is not None
        _note(document.name, document.error, skipped)
    return good


def _read_at_once(
    embedder: Embedder,
    texts: list[tuple[str, str]],
    queries: list[str],
    vectors: list[Tensor],
    passage: int,
    heading: str | None,
    top: int,
    words: int,
    save: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Encode the texts, answer the queries, write the vectors; what was done, as plain values."""
    from farlight.cli.vectors import save_vectors
    from farlight.embedding.book import read_books

    library = read_books(
        embedder,
        texts,
        passage=passage,
        heading=heading,
        start=lambda parts: progress.start(["reading"] * parts),
        step=lambda title: progress.step("reading"),
    )
    progress.start([_TRACE_STEP] * (min(top, len(library.owners)) * len(queries)))
    answers = [
        _answer(library, embedder, text, vector, top, words, progress) for text, vector in zip(queries, vectors, strict=True)
    ]
    if save is not None:
        save_vectors(save, library)
    return {
        "passage_tokens": passage,
        "seconds": library.seconds,
        "tokens": sum(len(part.tokens) for part in library.parts),
        "passages": len(library.owners),
        "chapters": [
            {"book": library.names[part.book], "title": part.title, "tokens": len(part.tokens)} for part in library.parts
        ],
        "queries": answers,
    }


def _check_options(queries: list[str], files: list[Path], index: Path | None, save: Path | None, words: int | None) -> None:
    """Raise ArgumentError for options that cannot be used together."""
    from farlight.cli.vectors import check_format

    if not files and index is None:
        raise ArgumentError("no text was given; name files, folders or globs, or - for standard input.")
    if not queries and save is None and index is None:
        raise ArgumentError('nothing was asked: give --query "…", or --save vectors.npz or --index to keep the vectors.')
    if not files and not queries:
        raise ArgumentError('nothing was asked: give texts to read into the index, or --query "…".')
    if any(not text.strip() for text in queries):
        raise ArgumentError("a --query is empty; write a question or a sentence.")
    if any("\ud800" <= mark <= "\udfff" for text in queries for mark in text):
        raise ArgumentError("a --query is not UTF-8; write it in the encoding of this terminal.")
    if index is not None and save is not None:
        raise ArgumentError("--index keeps the vectors already; leave out --save.")
    if index is not None and words:
        raise ArgumentError("--words reads the chapter again, which an index does not keep; leave out --index, or --words.")
    if save is not None:
        check_format(save)


def _check_ranks(ranks: Ranks | None, index: Path | None, paths: list[Path]) -> None:
    """Raise ArgumentError for what several processes cannot do together."""
    if ranks is None:
        return
    if index is None:
        raise ArgumentError("under torchrun each process reads a share of the documents; give --index, where all keep theirs.")
    if any(str(path) == "-" for path in paths):
        raise ArgumentError("standard input goes to one process; under torchrun name files, folders or globs.")


def _check_numbers(numbers: dict[str, tuple[int, int]]) -> None:
    """Raise ArgumentError for a number below its smallest; `numbers`: name -> (value, smallest valid value)."""
    for name, (value, least) in numbers.items():
        if value < least:
            raise ArgumentError(f"--{name} {value}: at least {least} is needed.")


def _query_vector(embedder: Embedder, text: str) -> Tensor:
    """The embedding of a query. Raises ArgumentError where it is longer than one pass."""
    ids = embedder.tokens(text).ids
    if len(ids) > embedder.max_tokens:
        raise ArgumentError(
            f"a --query has {len(ids)} tokens, more than the {embedder.max_tokens} that one pass reads; shorten it."
        )
    return embedder.read(ids).vector


def _answer(
    library: Library, embedder: Embedder, text: str, query: Tensor, top: int, words: int, progress: Progress
) -> dict[str, Any]:
    """The best passages and chapters for a query, as plain values; `words`: attended words to list per passage."""
    matches = library.find(query, top)
    passages = []
    for place in matches.passages:
        part = library.parts[place.part]
        progress.step(_TRACE_STEP)
        attended = library.attended_words(embedder, place, query, words) if words else []
        passages.append(
            {
                "score": place.score,
                "book": library.names[part.book],
                "title": part.title,
                "start": place.start,
                "stop": place.stop,
                "text": library.texts[part.book][place.start : place.stop],
                "words": [
                    {
                        "word": word.word,
                        "share": word.share,
                        "start": word.start,
                        "inside": place.start <= word.start < place.stop,
                    }
                    for word in attended
                ],
            }
        )
    chapters = [
        {"score": score, "book": library.names[library.parts[part].book], "title": library.parts[part].title}
        for part, score in matches.chapters
    ]
    return {"query": text, "passages": passages, "chapters": chapters}
