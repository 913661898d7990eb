"""Retrieval quality of late chunking: a book embedded one chapter per pass, against passages alone and windows of 512 tokens.

all-MiniLM-L6-v2 has 512 positions. `fl.hf.lengthen` extends it to 8192, a sparse pattern makes a chapter affordable, and a
passage vector is the mean over tokens that attended within their whole chapter. The baselines embed the same passages with the
unmodified model, alone and in windows of 512 tokens. The queries are random sentences; the targets are the passage and the
chapter that contain them.

    python examples/embed_a_book.py book.txt --out results             # an hour on one core for a book of 730 000 tokens
    python examples/embed_a_book.py book.txt --out results --smoke     # seconds: a smoke test

Vectors are saved in --out, one file per method, and reused by the next run; the table is written there too.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import farlight as fl
from farlight.cli.inputs import read_text
from farlight.embedding.book import ChapterPart, split_parts
from farlight.embedding.chapters import sentences, split_chapters
from farlight.embedding.reading import Embedder, Encoding
from farlight.hf.loading import load_model

PLAIN_LENGTH = 512
PATTERNS = (
    "window(64) | global_tokens([0, -1])",
    "window(128) | global_tokens([0, -1])",
    "window(256) | global_tokens([0, -1])",
    "full()",
)
ALONE, WINDOWS = "plain, each passage alone", "plain, windows of 512 tokens"


@dataclass(frozen=True)
class Vectors:
    """Unit vectors of all chapters `(C, D)` and passages `(P, D)`, and the seconds of embedding."""

    chapters: Tensor
    passages: Tensor
    seconds: float


def stacked(readings: Iterator[tuple[Tensor, Tensor]]) -> Vectors:
    begun = time.perf_counter()
    chapters, passages = zip(*readings, strict=True)
    return Vectors(torch.stack(chapters), torch.cat(passages), time.perf_counter() - begun)


def in_one_pass(embedder: Embedder, parts: Sequence[ChapterPart]) -> Iterator[tuple[Tensor, Tensor]]:
    for part in parts:
        reading = embedder.read(part.tokens.ids)
        yield reading.vector, reading.passages(part.passages)


def in_windows(plain: Embedder, parts: Sequence[ChapterPart]) -> Iterator[tuple[Tensor, Tensor]]:
    """Adjacent windows; a chapter vector is the mean of its windows' vectors, a passage vector that of its tokens."""
    for part in parts:
        readings = [
            plain.read(part.tokens.ids[at : at + plain.max_tokens]) for at in range(0, len(part.tokens), plain.max_tokens)
        ]
        chapter = normalize(torch.stack([reading.vector for reading in readings]).mean(0), dim=0)
        whole = Encoding(torch.cat([reading.states for reading in readings]), chapter)
        yield chapter, whole.passages(part.passages)


def each_alone(plain: Embedder, parts: Sequence[ChapterPart]) -> Iterator[tuple[Tensor, Tensor]]:
    for part in parts:
        vectors = torch.stack([plain.read(part.tokens.ids[a:b]).vector for a, b in part.passages])
        yield normalize(vectors.mean(0), dim=0), vectors


def sample_sentences(
    texts: Sequence[ChapterPart], text: str, owners: Sequence[tuple[int, int]], count: int, seed: int
) -> list[tuple[int, str]]:
    """(passage, sentence) pairs, drawn without replacement from the sentences of 8 words or more inside one passage."""
    candidates = []
    for number, (part, passage) in enumerate(owners):
        start, stop = texts[part].span(passage)
        for a, b in sentences(text, start, stop):
            if len(text[a:b].split()) >= 8:
                candidates.append((number, " ".join(text[a:b].split())))
    return random.Random(seed).sample(candidates, min(count, len(candidates)))


def ranks(queries: Tensor, vectors: Tensor, target: Tensor) -> Tensor:
    """`(Q,)`: the number of vectors nearer to each query than its target."""
    similarity = queries @ vectors.T
    return (similarity > similarity.gather(1, target[:, None])).sum(1)


def evaluate(vectors: Vectors, windows: Vectors, queries: Tensor, passage: Tensor, chapter: Tensor) -> dict[str, float]:
    by_passage, by_chapter = ranks(queries, vectors.passages, passage), ranks(queries, vectors.chapters, chapter)
    chapter_cosine = (vectors.chapters * windows.chapters).sum(-1)
    passage_cosine = (vectors.passages * windows.passages).sum(-1)
    return {
        "passage_hit_1": (by_passage < 1).float().mean().item(),
        "passage_hit_5": (by_passage < 5).float().mean().item(),
        "passage_mrr": (1 / (1 + by_passage.float())).mean().item(),
        "chapter_hit_1": (by_chapter < 1).float().mean().item(),
        "chapter_hit_5": (by_chapter < 5).float().mean().item(),
        "passage_cosine_mean": passage_cosine.mean().item(),
        "passage_cosine_least": passage_cosine.min().item(),
        "chapter_cosine_mean": chapter_cosine.mean().item(),
        "chapter_cosine_least": chapter_cosine.min().item(),
        "seconds": vectors.seconds,
    }


SHARES = {
    "passage_hit_1": "passage hit@1", "passage_hit_5": "hit@5", "passage_mrr": "MRR", "chapter_hit_1": "chapter hit@1",
    "chapter_hit_5": "hit@5", "passage_cosine_mean": "cosine of passages to those of windows", "passage_cosine_least": "least",
    "chapter_cosine_mean": "cosine of chapters", "chapter_cosine_least": "least",
}  # fmt: skip


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"| embedded how | {' | '.join(SHARES.values())} | seconds |", "|---" * (len(SHARES) + 2) + "|"]
    for name, row in rows.items():
        shown = name.replace("|", "\\|")  # a bar would end the cell
        lines.append(f"| {shown} | {' | '.join(f'{row[key]:.3f}' for key in SHARES)} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a long UTF-8 text with chapters")
    parser.add_argument("--out", type=Path, default=Path("embed_a_book"))
    parser.add_argument("--pattern", action="append", help=f"repeat for several; default {PATTERNS}")
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--passage", type=int, default=128, help="tokens in a passage, at most")
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="embed by this method only (part of its name), and stop")
    parser.add_argument("--smoke", action="store_true", help="three chapters, twenty sentences")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    name, text = read_text(options.text)
    chapters = split_chapters(text)
    if options.smoke:
        chapters, options.sentences = chapters[:3], 20
    plain_model, long_model = load_model(None), load_model(None)
    plain = Embedder(plain_model.model, plain_model.tokenizer, fl.full(), positions=PLAIN_LENGTH, backend="auto")
    long = Embedder(long_model.model, long_model.tokenizer, fl.full(), positions=options.positions)
    parts = [part for c in chapters for part in split_parts(long, text, c, c.title, 0, options.passage)]
    owners = [(number, i) for number, part in enumerate(parts) for i in range(len(part.passages))]
    sizes = [len(part.tokens) for part in parts]
    print(f"{len(parts)} passes, {sum(sizes):,} tokens, longest {max(sizes):,}, {len(owners):,} passages", flush=True)

    methods: dict[str, Any] = {ALONE: lambda: each_alone(plain, parts), WINDOWS: lambda: in_windows(plain, parts)}
    for pattern in options.pattern or PATTERNS:
        sparse = Embedder(long_model.model, long_model.tokenizer, fl.parse(pattern), positions=options.positions)
        methods[f"one pass, {pattern}"] = lambda sparse=sparse: in_one_pass(sparse, parts)
    vectors_of: dict[str, Vectors] = {}
    for method, readings in methods.items():
        if options.only and options.only not in method:
            continue
        stamp = f"{'smoke ' if options.smoke else ''}{method} {options.positions} {options.passage}"
        vectors_file = options.out / ("".join(c if c.isalnum() else "-" for c in stamp) + ".pt")
        if vectors_file.exists():
            vectors_of[method] = Vectors(**torch.load(vectors_file))
        else:
            vectors_of[method] = stacked(readings())
            torch.save(vars(vectors_of[method]), vectors_file)
        print(f"{method}: {vectors_of[method].seconds:.0f} s", flush=True)
    if options.only:
        return

    samples = sample_sentences(parts, text, owners, options.sentences, options.seed)
    queries = torch.stack([plain.read(plain.tokens(sentence).ids[: plain.max_tokens]).vector for _, sentence in samples])
    passage = torch.tensor([number for number, _ in samples])
    chapter = torch.tensor([owners[number][0] for number, _ in samples])
    rows = {method: evaluate(vectors, vectors_of[WINDOWS], queries, passage, chapter) for method, vectors in vectors_of.items()}
    about = {
        "text": Path(name).name, "passes": len(parts), "tokens": sum(sizes), "longest": max(sizes), "passages": len(owners),
        "sentences": len(samples), "seed": options.seed, "passage": options.passage, "positions": options.positions,
        "machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": __import__("transformers").__version__, "farlight": fl.__version__,
    }  # fmt: skip
    (options.out / "results.json").write_text(json.dumps({"about": about, "ways": rows}, indent=2), encoding="utf-8")
    (options.out / "table.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
