"""Documents as vectors: long texts encoded in one pass each, cut afterwards, searched, and kept in an index on disk."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from farlight.embedding.book import Library, encode_document, read_books
from farlight.embedding.index import Index, IndexHit
from farlight.embedding.reading import Embedder, Encoding

if TYPE_CHECKING:
    from farlight.embedding.sentence_module import SparseTransformer as SparseTransformer

# Without SparseTransformer: `from farlight.embedding import *` needs no optional package.
__all__ = ["Embedder", "Encoding", "Index", "IndexHit", "Library", "encode_document", "read_books"]


def __getattr__(name: str) -> Any:
    """`SparseTransformer` inherits from a class of sentence-transformers: not loaded before it is needed."""
    if name == "SparseTransformer":
        from farlight.embedding.sentence_module import SparseTransformer

        return SparseTransformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, `SparseTransformer` where sentence-transformers is installed."""
    return sorted([*__all__, *(["SparseTransformer"] if find_spec("sentence_transformers") else [])])
