"""An index on disk: the vectors and passages of many documents, written piece by piece, resumed after an interruption.

A folder with `settings.json` and pieces `000001-….npz`. A piece holds whole documents and is renamed into place when it is
complete, so that a process killed at any moment leaves complete pieces only, and what it had not written is read again. A
document is known by its name and a digest of its text: the same text is not encoded twice, a changed one replaces the older.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farlight.embedding.book import encode_document
from farlight.embedding.reading import Embedder
from farlight.errors import ArgumentError, FarlightError

__all__ = ["Index", "IndexHit"]

_FORMAT = 1
# A piece is written after this many documents or seconds: what a kill can cost.
_PIECE_DOCUMENTS, _PIECE_SECONDS = 256, 5.0
# Two models are taken for one where their vectors of this sentence agree.
_PROBE, _AGREE = "The quick brown fox jumps over the lazy dog.", 0.999


@dataclass(frozen=True)
class IndexHit:
    """A passage that a search returned: its document, the chapter's title, cosine, characters [start, stop), and its text."""

    document: str
    title: str
    score: float
    start: int
    stop: int
    text: str


@dataclass
class _Piece:
    """Documents as arrays of one row per chapter part and per passage.

    meta: {"documents": [[name, digest]], "titles": [per part], "texts": [per passage]}. part_document, passage_part: owner of
    each row. spans: `(passages, 2)` characters.
    """

    meta: dict[str, list[Any]]
    chapters: np.ndarray
    passages: np.ndarray
    part_document: np.ndarray
    passage_part: np.ndarray
    spans: np.ndarray


class Index:
    """Documents as unit vectors in a folder, made by one embedder and searched without reading them again.

    Index(folder, embedder): opens the folder, or makes it. `passage`: tokens of a passage, at most; `heading`: as for
    `read_books`. An embedder of another model or pattern than the folder's, and other settings, raise ArgumentError.

        index = fl.embedding.Index("letters.index", fl.embedding.Embedder.load())
        index.add((path.name, path.read_text()) for path in folder.glob("*.txt"))
        index.search("a duel in the snow")

    `documents`: names in the order of their first piece; `vectors()`: float32 unit vectors of each.
    """

    def __init__(
        self, folder: str | Path, embedder: Embedder, *, passage: int | None = None, heading: str | None = None
    ) -> None:
        self.folder, self.embedder = Path(folder), embedder
        settings = _settings(self.folder)
        probe = embedder.embed([_PROBE])[0]
        if settings is None:
            settings = {"format": _FORMAT, "model": embedder.name, "pattern": repr(embedder.pattern)}
            settings |= {"passage": 128 if passage is None else passage, "heading": heading, "probe": probe.tolist()}
            if settings["passage"] < 1:
                raise ArgumentError(f"passages of {passage} tokens cannot be; use at least 1.")
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(self.folder / "settings.json", json.dumps(settings, indent=1).encode())
        self.settings = settings
        for name, value in (("passage", passage), ("heading", heading), ("pattern", repr(embedder.pattern))):
            if value is not None and value != settings[name]:
                raise ArgumentError(
                    f"index {str(self.folder)!r} was made with {name} = {settings[name]!r}, not {value!r}; leave the option "
                    "out, or make another index."
                )
        known = torch.tensor(settings["probe"])
        if known.shape != probe.shape or float(known @ probe) < _AGREE:
            raise ArgumentError(
                f"index {str(self.folder)!r} was made by the model {settings['model']!r}, which gives other vectors than "
                f"{embedder.name!r}; use that model, or make another index."
            )
        self._pieces: list[_Piece] = []
        self._open: list[Any] = []
        self._digests: dict[str, str] = {}
        for path in sorted(self.folder.glob("*.npz")):
            self._keep(_read_piece(path))
        self._next = len(list(self.folder.glob("*.npz"))) + 1

    @classmethod
    def settings_of(cls, folder: str | Path) -> dict[str, Any] | None:
        """The settings of a folder: model, pattern, passage, heading; None where it holds no index."""
        return _settings(Path(folder))

    @property
    def documents(self) -> list[str]:
        """Names of the documents."""
        return list(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        passages = sum(int(self._live_passages(piece).sum()) for piece in self._pieces)
        made = f"{self.settings['model']} under {self.settings['pattern']}"
        return f"<Index {str(self.folder)!r}: {len(self):,} documents in {passages:,} passages, {made}>"

    def has(self, name: str, text: str) -> bool:
        """Whether the document is there with this very text."""
        return self._digests.get(name) == _digest(text)

    def add(
        self,
        documents: Iterable[tuple[str, str]],
        *,
        step: Callable[[str], None] = lambda name: None,
        skip: Callable[[str, FarlightError], None] | None = None,
    ) -> int:
        """Encode (name, text) documents that are not there yet; returns how many were encoded.

        `step` is called with each name. A document without words raises ArgumentError, or is passed to `skip`. Everything
        encoded is on disk when this returns or raises.
        """
        added, written = 0, time.monotonic()
        try:
            for name, text in documents:
                step(name)
                if self.has(name, text):
                    continue
                try:
                    encoded = encode_document(
                        self.embedder, name, text, passage=self.settings["passage"], heading=self.settings["heading"]
                    )
                except FarlightError as error:
                    if skip is None:
                        raise
                    skip(name, error)
                    continue
                self._open.append((name, _digest(text), text, encoded))
                added += 1
                if len(self._open) >= _PIECE_DOCUMENTS or time.monotonic() - written > _PIECE_SECONDS:
                    self._write()
                    written = time.monotonic()
        finally:
            self._write()
        return added

    def search(self, query: str | Tensor, count: int = 5) -> list[IndexHit]:
        """The `count` passages with the largest cosine to a query, a text or a unit vector `(features,)`."""
        vector = self.embedder.embed([query])[0] if isinstance(query, str) else query
        scores, places = [], []
        for number, piece in enumerate(self._pieces):
            similarity = torch.from_numpy(piece.passages) @ vector
            scores.append(similarity.masked_fill(~torch.from_numpy(self._live_passages(piece)), -torch.inf))
            places += [(number, row) for row in range(len(piece.passages))]
        if not places:
            return []
        top = torch.cat(scores).topk(min(count, len(places)))
        found = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        return [self._hit(places[place], score) for score, place in found if score > -np.inf]

    def vectors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By document its chapter vectors `(parts, features)` and passage vectors `(passages, features)`."""
        out: dict[str, tuple[Tensor, Tensor]] = {}
        for piece in self._pieces:
            live = self._live(piece)
            for number, (name, _) in enumerate(piece.meta["documents"]):
                if live[number]:
                    rows = piece.part_document[piece.passage_part] == number
                    chapters = torch.from_numpy(piece.chapters[piece.part_document == number])
                    out[name] = chapters, torch.from_numpy(piece.passages[rows])
        return out

    def _live(self, piece: _Piece) -> np.ndarray:
        """Per document of a piece, whether it is the newest of its name."""
        return np.array([self._digests[name] == digest for name, digest in piece.meta["documents"]], dtype=bool)

    def _live_passages(self, piece: _Piece) -> np.ndarray:
        """Per passage of a piece, whether its document is the newest of its name."""
        live: np.ndarray = self._live(piece)[piece.part_document[piece.passage_part]]
        return live

    def _hit(self, place: tuple[int, int], score: float) -> IndexHit:
        """The passage in row `place[1]` of piece `place[0]`."""
        piece, row = self._pieces[place[0]], place[1]
        part = int(piece.passage_part[row])
        document = piece.meta["documents"][int(piece.part_document[part])][0]
        start, stop = piece.spans[row].tolist()
        return IndexHit(document, piece.meta["titles"][part], score, start, stop, piece.meta["texts"][row])

    def _keep(self, piece: _Piece) -> None:
        self._pieces.append(piece)
        self._digests |= dict(piece.meta["documents"])

    def _write(self) -> None:
        """Write the open documents as one piece."""
        if not self._open:
            return
        titles: list[str] = []
        texts, part_document, passage_part, spans = [], [], [], []
        for number, (_, _, text, encoded) in enumerate(self._open):
            for part in encoded.parts:
                for passage in range(len(part.passages)):
                    start, stop = part.span(passage)
                    passage_part.append(len(titles))
                    spans.append((start, stop))
                    texts.append(text[start:stop])
                titles.append(part.title)
                part_document.append(number)
        meta: dict[str, list[Any]] = {
            "documents": [[name, digest] for name, digest, _, _ in self._open],
            "titles": titles,
            "texts": texts,
        }
        piece = _Piece(
            meta,
            np.concatenate([encoded.chapters.numpy() for *_, encoded in self._open]),
            np.concatenate([encoded.passages.numpy() for *_, encoded in self._open]),
            np.array(part_document, dtype=np.int64),
            np.array(passage_part, dtype=np.int64),
            np.array(spans, dtype=np.int64).reshape(-1, 2),
        )
        path = self.folder / f"{self._next:06d}-{uuid.uuid4().hex[:8]}.npz"
        arrays: dict[str, Any] = asdict(piece) | {"meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)}
        half = path.with_suffix(".half")
        try:
            with half.open("wb") as file:
                np.savez(file, **arrays)
            half.replace(path)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise FarlightError(f"index {str(self.folder)!r} cannot be written: {error.strerror or error}.") from error
        self._next += 1
        self._open = []
        self._keep(piece)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _replace(path: Path, data: bytes) -> None:
    half = path.with_suffix(".half")
    half.write_bytes(data)
    half.replace(path)


def _settings(folder: Path) -> dict[str, Any] | None:
    path = folder / "settings.json"
    if not path.exists():
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise ArgumentError(f"index {str(folder)!r} is something else than an index; name a new folder.")
        return None
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        wanted: Sequence[str] = ("format", "model", "pattern", "passage", "heading", "probe")
        if any(name not in settings for name in wanted) or settings["format"] != _FORMAT:
            raise ValueError(f"format {settings.get('format')!r}, this farlight reads {_FORMAT}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ArgumentError(f"index {str(folder)!r}: settings.json cannot be read ({error}); make the index again.") from error
    return settings


def _read_piece(path: Path) -> _Piece:
    """A piece from disk. Raises FarlightError where it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        piece = _Piece(meta, **arrays)
        rows = {len(piece.passages), len(piece.passage_part), len(piece.spans), len(meta["texts"])}
        parts = {len(piece.chapters), len(piece.part_document), len(meta["titles"])}
        owners = (piece.passage_part, len(piece.chapters)), (piece.part_document, len(meta["documents"]))
        if len(rows) > 1 or len(parts) > 1 or any(ids.size and not 0 <= ids.min() <= ids.max() < n for ids, n in owners):
            raise ValueError("its tables do not belong together")
    except Exception as error:  # readers of zip archives, arrays and JSON raise any type for a damaged file
        raise FarlightError(
            f"index piece {str(path)!r} is damaged ({error}); delete it, and its documents are read again by the next add."
        ) from error
    return piece
