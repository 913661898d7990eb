"""`farlight embed --index`: documents read into a folder, by one process or by all that torchrun started, and its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farlight.errors import ArgumentError, FarlightError

if TYPE_CHECKING:
    from torch import Tensor

    from farlight.analysis.progress import Progress
    from farlight.cli.documents import Document
    from farlight.cli.ranks import Ranks
    from farlight.embedding.index import Index
    from farlight.embedding.reading import Embedder

__all__ = ["answer_of_index", "read_into_index"]


def read_into_index(
    folder: Path,
    embedder: Embedder,
    documents: Iterator[Document],
    files: int,
    passage: int | None,
    heading: str | None,
    note: Callable[[str, FarlightError], None],
    ranks: Ranks | None,
    progress: Progress,
) -> tuple[Index, dict[str, Any]] | None:
    """(the index with these documents, what was done); None on ranks other than the first, which sums up for all.

    note: called with the name of a document that is skipped, and why. ranks: the processes that read their documents into the
    same folder.
    """
    from farlight.embedding.index import Index

    if ranks is not None and ranks.rank:
        ranks.wait_for("opened", 0)  # the first rank makes the folder
    index = Index(folder, embedder, passage=passage, heading=heading)
    if ranks is not None:
        ranks.publish("opened", True)
    skipped: list[tuple[str, str]] = []
    seen = 0

    def skip(name: str, error: FarlightError) -> None:
        skipped.append((name, str(error)))
        if ranks is None or not ranks.rank:  # the first rank notes those of all
            note(name, error)

    def readable() -> Iterator[tuple[str, str]]:
        nonlocal seen
        for document in documents:
            seen += 1
            if document.error is not None:
                skip(document.name, document.error)
            else:
                yield document.name, document.text

    progress.start(["reading"] * files)
    added = index.add(readable(), step=lambda name: progress.step("reading"), skip=skip)
    if ranks is not None:
        ranks.publish("done", [added, seen, skipped])
        if ranks.rank:
            return None
        others = [ranks.wait_for("done", rank) for rank in range(1, ranks.world)]
        added += sum(count for count, _, _ in others)
        seen += sum(count for _, count, _ in others)
        for name, why in (pair for _, _, pairs in others for pair in pairs):
            skip(name, FarlightError(why))
        index = Index(folder, embedder)  # with the pieces of the others
    if skipped and len(skipped) == seen:
        raise ArgumentError(f"none of the documents can be read; the first: {skipped[0][1]}")
    done = {"index": str(folder), "documents": len(index), "added": added}
    return index, done | {"passage_tokens": index.settings["passage"]}


def answer_of_index(index: Index, text: str, vector: Tensor, top: int) -> dict[str, Any]:
    """The best passages of an index for a query, as plain values."""
    passages = [
        {"score": hit.score, "book": hit.document, "title": hit.title, "start": hit.start, "stop": hit.stop, "text": hit.text}
        for hit in index.search(vector, top)
    ]
    return {"query": text, "passages": passages}
