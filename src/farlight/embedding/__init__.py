"""Documents as vectors: long texts encoded in one pass each, cut afterwards, searched, and kept in an index on disk."""

from farlight.embedding.book import Library, encode_document, read_books
from farlight.embedding.index import Index, IndexHit
from farlight.embedding.reading import Embedder, Encoding

__all__ = ["Embedder", "Encoding", "Index", "IndexHit", "Library", "encode_document", "read_books"]
