"""`SparseTransformer`: the first module of a `SentenceTransformer`, reading long texts under a pattern.

A module of sentence-transformers keeps its settings beside the weights, so that pattern and positions are saved and loaded with
the model. The package is imported here only.
"""

from __future__ import annotations

from typing import Any

from farlight.embedding.reading import DEFAULT_PATTERN
from farlight.errors import UnsupportedError
from farlight.hf.lengthen import lengthen, positions_of
from farlight.hf.sparsify import sparsify
from farlight.patterns import parse
from farlight.patterns.expression import Pattern

try:
    from sentence_transformers.sentence_transformer.modules import Transformer
except ImportError as error:
    raise UnsupportedError(
        f"fl.embedding.SparseTransformer is a module of sentence-transformers, which cannot be imported ({error}); "
        "pip install 'sentence-transformers>=6'."
    ) from error

__all__ = ["SparseTransformer"]


class SparseTransformer(Transformer):
    """The `Transformer` module of sentence-transformers, lengthened to `positions` tokens and computed under `pattern`.

        module = fl.embedding.SparseTransformer("sentence-transformers/all-MiniLM-L6-v2", pattern=fl.window(64))
        model = SentenceTransformer(modules=[module, Pooling(module.get_embedding_dimension())])
        model.save("long-minilm"); SentenceTransformer("long-minilm", trust_remote_code=True)

    pattern: a pattern, or its text; by default `window(128) | global_tokens([0, -1])`. positions: the longest text in tokens,
    special ones included; longer ones are cut. options: those of `Transformer`. Pattern and positions are saved with the model;
    sentence-transformers imports classes of other packages only with `trust_remote_code=True`.

    Raises what `fl.hf.lengthen` and `fl.hf.sparsify` raise; PatternError for a text that is no pattern.
    """

    config_keys = [*Transformer.config_keys, "pattern", "positions"]  # noqa: RUF012 (sentence-transformers' declaration)

    def __init__(
        self, model_name_or_path: str, *, pattern: Pattern | str = DEFAULT_PATTERN, positions: int = 8192, **options: Any
    ) -> None:
        allowed = parse(pattern) if isinstance(pattern, str) else pattern
        super().__init__(model_name_or_path, **options)
        self.pattern, self.positions = repr(allowed), positions
        model_positions = positions_of(self.model)
        if model_positions is not None and model_positions < positions:
            lengthen(self.model, positions)
        self.max_seq_length = positions
        sparsify(self.model, allowed)
