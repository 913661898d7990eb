"""`farlight embed`: embeds books chapter by chapter, one pass each, and ranks their passages against queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farlight.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from farlight.analysis.progress import Progress
    from farlight.embedding.book import Library
    from farlight.embedding.reading import Embedder

__all__ = ["DEFAULT_PATTERN", "EXAMPLES", "embed_command"]

EXAMPLES = (
    "farlight embed book.txt --query 'Who was kind to the prisoner?'",
    "farlight embed book.txt --save vectors.npz",
)

# The first and last token ([CLS] and [SEP], say) are global.
DEFAULT_PATTERN = "window(128) | global_tokens([0, -1])"
# Characters of a passage in the printed answer.
_MAX_CHARACTERS = 300
_TRACE_STEP = "finding what was looked at"


def embed_command(
    files: Annotated[list[Path], typer.Argument(help="UTF-8 text files.")],
    query: Annotated[list[str] | None, typer.Option("--query", help="A question or a sentence. Repeat for several.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="An encoder: a folder or a Hugging Face name. Default: the packaged MiniLM."),
    ] = None,
    pattern: Annotated[str, typer.Option("--pattern", help="Who looks at whom while a chapter is read.")] = DEFAULT_PATTERN,
    positions: Annotated[int, typer.Option("--positions", help="Tokens in one pass; the model is lengthened to this.")] = 8192,
    passage: Annotated[int, typer.Option("--passage", help="Tokens in a passage, at most; it ends with a sentence.")] = 128,
    top: Annotated[int, typer.Option("--top", help="How many passages to show for each query.")] = 5,
    words: Annotated[int, typer.Option("--words", help="How many words that carried the attention to show.")] = 6,
    heading: Annotated[
        str | None,
        typer.Option("--heading", help="A regular expression that finds headings. Default: CHAPTER IV and the like."),
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Also write the vectors to this .npz file.")] = None,
    backend: Annotated[str, typer.Option("--backend", help="Which backend computes sparse attention.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Read books chapter by chapter, each in one pass, and rank the passages that answer a query."""
    from farlight.cli.inputs import load_model, read_patterns, read_text
    from farlight.cli.progress import progress_bar
    from farlight.kernels import registry

    # Cheap checks come before the model is loaded.
    (parsed,) = read_patterns([pattern])
    registry.check_name(backend)
    queries = list(query or [])
    _check_options(queries, save, {"positions": (positions, 8), "passage": (passage, 1), "top": (top, 1), "words": (words, 0)})
    books = [read_text(path) for path in files]
    with progress_bar() as progress:
        progress.start(["loading the model"])
        progress.step("loading the model")
        loaded = load_model(model)

        from farlight.embedding.book import read_books
        from farlight.embedding.reading import Embedder

        embedder = Embedder(loaded.model, loaded.tokenizer, parsed, positions=positions, backend=backend)
        query_vectors = [_query_vector(embedder, text) for text in queries]
        library = read_books(
            embedder,
            books,
            passage=passage,
            heading=heading,
            start=lambda parts: progress.start(["reading"] * parts),
            step=lambda title: progress.step("reading"),
        )
        progress.start([_TRACE_STEP] * (min(top, len(library.owners)) * len(queries)))
        answers = [
            _answer(library, embedder, text, vector, top, words, progress)
            for text, vector in zip(queries, query_vectors, strict=True)
        ]
    if save is not None:
        _save(save, library)
    report = {
        "model": loaded.name,
        "pattern": repr(parsed),
        "positions": positions,
        "passage_tokens": passage,
        "seconds": library.seconds,
        "tokens": sum(len(part.tokens) for part in library.parts),
        "passages": len(library.owners),
        "chapters": [
            {"book": library.names[part.book], "title": part.title, "tokens": len(part.tokens)} for part in library.parts
        ],
        "queries": answers,
    }
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _show(report)


def _check_options(queries: list[str], save: Path | None, numbers: dict[str, tuple[int, int]]) -> None:
    """Raise ArgumentError for options that cannot be used; `numbers`: name -> (value, smallest valid value)."""
    from farlight.cli.outputs import check_place

    if not queries and save is None:
        raise ArgumentError('nothing was asked: give --query "…", or --save vectors.npz to keep the vectors.')
    if any(not text.strip() for text in queries):
        raise ArgumentError("a --query is empty; write a question or a sentence.")
    if any("\ud800" <= mark <= "\udfff" for text in queries for mark in text):
        raise ArgumentError("a --query is not UTF-8; write it in the encoding of this terminal.")
    for name, (value, least) in numbers.items():
        if value < least:
            raise ArgumentError(f"--{name} {value}: at least {least} is needed.")
    if save is not None and save.suffix != ".npz":
        raise ArgumentError(f"--save {str(save)!r}: the vectors are written as .npz; let the name end so.")
    if save is not None:
        check_place("--save", save)


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


def _save(path: Path, library: Library) -> None:
    """Write chapter and passage vectors with their places in the books as .npz."""
    import numpy as np

    from farlight.cli.outputs import writing

    spans = [library.parts[part].span(passage) for part, passage in library.owners]
    with writing("--save", path):
        np.savez(
            path,
            chapters=library.chapter_vectors.numpy(),
            titles=np.array([part.title for part in library.parts]),
            passages=library.passage_vectors.numpy(),
            passage_part=np.array([part for part, _ in library.owners]),
            passage_start=np.array([start for start, _ in spans]),
            passage_stop=np.array([stop for _, stop in spans]),
            books=np.array(library.names),
            part_book=np.array([part.book for part in library.parts]),
        )


def _show(report: dict[str, Any]) -> None:
    """Print the answers."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    longest = max(chapter["tokens"] for chapter in report["chapters"])
    console.print(
        f"{report['model']} under {report['pattern']}: {report['tokens']:,} tokens in {len(report['chapters'])} passes of at "
        f"most {longest:,}, {report['passages']:,} passages, {report['seconds']:.1f} s",
        markup=False,
        highlight=False,
    )
    several = len({chapter["book"] for chapter in report["chapters"]}) > 1

    def title(of: dict[str, Any]) -> str:
        return f"{of['book']}: {of['title']}" if several and of["title"] != of["book"] else str(of["title"])

    for answer in report["queries"]:
        console.print(Text(f"\n{answer['query']}", style="bold"))
        for rank, passage in enumerate(answer["passages"], 1):
            console.print(Text(f"\n{rank}. {passage['score']:.3f}  {title(passage)}", style="cyan"))
            text = " ".join(passage["text"].split())
            console.print(Text(text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"))
            if passage["words"]:
                words = ", ".join(
                    f"{word['word']} {word['share']:.1%}" + ("" if word["inside"] else " (elsewhere)")
                    for word in passage["words"]
                )
                console.print(Text(f"looked at: {words}", style="dim"))
        chapters = "; ".join(f"{title(chapter)} {chapter['score']:.3f}" for chapter in answer["chapters"])
        console.print(Text(f"\nnearest chapters: {chapters}", style="dim"))
