"""BigBird and the encoder of BigBird-Pegasus: farlight's attention with Hugging Face's outputs, or with the paper's pattern.

With blocks of b tokens numbered 0 … n - 1, r random ones, and m(u, v) how often a query in block u counts the keys of block v:

    out[i] = Σ_j p[i, j] v[j],   p[i, j] ∝ m(i // b, j // b) exp(q[i]·k[j] / √D)   over real j;   out[i] = 0 where i is padding

    u = 0 and u = n - 1:  m = 1 for every v                                        (global blocks see all)
    else:                 m = 1 for |u - v| <= 1, v = 0, v = n - 1, plus one for each time that v is drawn

A block that counts m times is a weighted union: the attention over each part with its weight, merged by the log-sum-exp
(`farlight.merge`).

"hf_eval" draws as Hugging Face's model does: in evaluation block 0, r times, so that m(u, 0) = 1 + r; in training from the
first blocks of the text, the same at every step. "paper" draws from the whole text and counts a block once. Zaheer et al.
2020, "Big Bird: Transformers for Longer Sequences", arXiv:2007.14062.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from farlight.attention import attention
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.bigbird_training import training_blocks
from farlight.hf.probabilities import check_length, probabilities, wants_probabilities
from farlight.hf.swap import (
    Replacement,
    TensorVersion,
    capture_probabilities,
    collapse_batch,
    contains,
    loaded_class,
    merge_heads,
    reset_output_capturing,
    restore,
    set_attribute,
    split_heads,
)
from farlight.hf.tracing import refuse_jit_trace
from farlight.merge import merge
from farlight.patterns import blocked_window, chosen_blocks, full, padding, seen_by_all, sees_all
from farlight.patterns.expression import Pattern
from farlight.patterns.presets import bigbird

__all__ = ["BigBirdAttention", "replaces", "restore", "sparsify"]

_SEMANTICS = ("hf_eval", "paper")
# (file, class of the model or encoder, class of a layer's attention, class of its block-sparse child)
_CLASSES = (
    ("big_bird.modeling_big_bird", "BigBirdModel", "BigBirdAttention", "BigBirdBlockSparseAttention"),
    (
        "bigbird_pegasus.modeling_bigbird_pegasus",
        "BigBirdPegasusEncoder",
        "BigBirdPegasusEncoderAttention",
        "BigBirdPegasusBlockSparseAttention",
    ),
)
# The attention whose probabilities transformers records from the class of its child, which is replaced.
_RECORDED_BY_CLASS = ("big_bird.modeling_big_bird", "BigBirdAttention")
# Numbers of blocks for which a layer caches its random blocks.
_MAX_CACHED_LENGTHS = 8
# A pattern and how often its pairs count in the softmax.
Weighted = tuple[Pattern, float]


def replaces(model: nn.Module) -> bool:
    """Whether the model contains block-sparse attention of BigBird or of BigBird-Pegasus' encoder, or farlight's already."""
    return contains(model, BigBirdAttention) or next(_wrappers(model), None) is not None


def sparsify(model: Any, *, semantics: str = "hf_eval", seed: int = 0, backend: str = "auto") -> Any:
    """Replace the block-sparse attention of a BigBird model, or of BigBird-Pegasus' encoder; the model is changed and returned.

    Parameters and state dict stay what they are; `restore(model)` undoes it. A text is not padded to whole blocks, memory
    does not grow with n², and a short text changes nothing for the next one. Calling it again changes the options.

    Args:
        model: a transformers model whose configuration says attention_type="block_sparse".
        semantics: "hf_eval" gives the numbers of Hugging Face's model, in evaluation and in training; up to (5 + 2r)·b tokens
            that is full attention, as there. "paper" is `fl.presets.bigbird(b, r, seed + layer)` at every length. Only full
            attention drops attention links in training: block-sparse attention never did, there or as published.
        seed: of the "paper" draws.
        backend: as in `fl.attention`.

    Raises:
        UnsupportedError: the model has no such attention, or is a decoder. ArgumentError: an unknown semantics.

    >>> import torch, farlight.hf.bigbird
    >>> from transformers import BigBirdConfig, BigBirdModel
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    >>> config = BigBirdConfig(block_size=2, num_random_blocks=1, max_position_embeddings=32, **sizes)
    >>> model = BigBirdModel(config).eval()
    >>> ids = torch.arange(20)[None] % 8 + 1
    >>> before = model(ids).last_hidden_state
    >>> after = farlight.hf.bigbird.sparsify(model)(ids).last_hidden_state
    >>> torch.allclose(before, after, atol=1e-6)
    True
    """
    if semantics not in _SEMANTICS:
        raise ArgumentError(
            f'semantics = {semantics!r} is unknown; use "hf_eval" (the numbers of Hugging Face\'s model) or "paper" (random '
            "blocks over the whole text)."
        )
    restore(model)
    wrappers = list(_wrappers(model))
    if not wrappers:
        raise UnsupportedError(
            f"{type(model).__name__} holds no block-sparse attention of BigBird or BigBird-Pegasus (its configuration must say "
            'attention_type="block_sparse"); for other models use fl.hf.sparsify.'
        )
    for owner, attention_class in wrappers:
        if getattr(owner.config, "is_decoder", False):
            raise UnsupportedError(
                f"{type(owner).__name__} is a decoder, but block-sparse BigBird attention sees the future (Hugging Face's "
                'too); load it with attention_type="original_full" or with is_decoder=False.'
            )
        texts = _TextCache()
        reset_output_capturing(owner)
        # A short text switches Hugging Face's model to full attention for good; this switches it back.
        owner.set_attention_type("block_sparse")
        for layer, module in enumerate(m for m in owner.modules() if isinstance(m, attention_class)):
            module.self = BigBirdAttention(module.self, owner.config, semantics, seed + layer, backend, texts)
            if attention_class is loaded_class(*_RECORDED_BY_CLASS):
                module.self.register_forward_hook(capture_probabilities)
        _install_forward(owner, attention_class)
    return model


def _wrappers(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """(model or encoder, class of its layers' attention) for each with block-sparse attention."""
    for file, owner, attention_class, _ in _CLASSES:
        cls = loaded_class(file, owner)
        for module in model.modules():
            if cls is not None and isinstance(module, cls) and module.config.attention_type == "block_sparse":
                yield module, loaded_class(file, attention_class)


def _install_forward(owner: Any, attention_class: Any) -> None:
    """Make the model pass its padding mask to every layer, without padding the text or switching the attention type.

    With attention_type "original_full" it does neither, and passes a four-dimensional mask unchanged. The configuration, which
    other models may share, is not written to.
    """
    set_attribute(owner, owner, "forward", _PaddingForward(owner))
    set_attribute(owner, owner, "set_attention_type", functools.partial(_refuse_attention_type, type(owner).__name__))
    for module in owner.modules():
        if module is owner or isinstance(module, attention_class):
            set_attribute(module, module, "attention_type", "original_full")


class _PaddingForward:
    """The `forward` of a model or encoder, with the padding mask `(B, N)` passed as `(B, 1, 1, N)` bool."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(functools.partial(type(self.owner).forward, self.owner))

    @property
    def __code__(self) -> Any:
        """That of the model's own method: torch.export names the inputs' place in the source by it."""
        return type(self.owner).forward.__code__

    def __call__(self, input_ids: Tensor | None = None, attention_mask: Any = None, *args: Any, **options: Any) -> Any:
        x = options.get("inputs_embeds") if input_ids is None else input_ids
        if isinstance(x, Tensor):
            if attention_mask is None:
                attention_mask = torch.ones(1, dtype=torch.bool, device=x.device).expand(x.shape[:2])
            if attention_mask.shape != x.shape[:2]:
                raise UnsupportedError(
                    f"{type(self.owner).__name__} was given an attention mask of shape {tuple(attention_mask.shape)}, but "
                    f"block-sparse attention takes a padding mask only: pass the model a 2-D attention_mask, here "
                    f"{tuple(x.shape[:2])}."
                )
            attention_mask = attention_mask.to(x.device, torch.bool)[:, None, None, :]
        return type(self.owner).forward(self.owner, input_ids, attention_mask, *args, **options)


def _refuse_attention_type(name: str, value: str) -> None:
    raise UnsupportedError(
        f"{name}: the attention type cannot be set to {value!r} while the model is sparsified; call restore(model) first."
    )


class BigBirdAttention(Replacement):
    """Replaces one `BigBirdBlockSparseAttention` or `BigBirdPegasusBlockSparseAttention`; see the module docstring."""

    query: nn.Module
    key: nn.Module
    value: nn.Module

    def __init__(
        self,
        original: nn.Module,
        config: Any,
        semantics: str = "hf_eval",
        seed: int = 0,
        backend: str = "auto",
        texts: Any = None,
    ) -> None:
        super().__init__(original)
        self.config = config
        self.heads: int = config.num_attention_heads
        self.block: int = config.block_size
        self.random: int = config.num_random_blocks
        # BigBird-Pegasus calls it attention_dropout.
        self.dropout: float = getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", 0.0))
        self.semantics, self.seed, self.backend = semantics, seed, backend
        self._drawn: dict[int, Tensor] = {}
        self._texts: _TextCache = _TextCache() if texts is None else texts

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`(B, N, E)` to `(B, N, E)`, N any number; `attention_mask` `(B, 1, 1, N)`, 0 = padding.

        The second result is None, or under `output_attentions` the probabilities `(B, H, N, N)` that multiply the values: a
        block that counts m times has m times its weight. Raises UnsupportedError for those of long texts.
        """
        refuse_jit_trace(self)
        returns_probabilities = wants_probabilities(self, kwargs.get("output_attentions"))
        if returns_probabilities:
            check_length(self, *hidden_states.shape[1:2] * 2)
        if encoder_hidden_states is not None or past_key_values is not None:
            raise UnsupportedError(
                f"{type(self).__name__} was given encoder_hidden_states or past_key_values, but block-sparse attention has "
                "neither cross-attention nor a cache; call restore(model) for that."
            )
        text = self._texts(attention_mask)
        q, k, v = (split_heads(f(hidden_states), self.heads) for f in (self.query, self.key, self.value))
        short = self.semantics == "hf_eval" and hidden_states.shape[1] <= (5 + 2 * self.random) * self.block
        dropout = self.dropout if self.training and short else 0.0
        if short:
            pieces = text.pieces("short", lambda: [(full(), 1.0)], zero_padding_rows=False)
        elif self.semantics == "paper":
            pieces = text.pieces(("paper", self.seed), lambda: self._paper(text.tokens))
        elif not self.training:
            pieces = text.pieces("evaluation", lambda: self._evaluation(text.tokens))
        else:
            pieces = text.pieces(("training", id(self)), lambda: self._training(text.tokens))
        partials = [
            attention(q, k, v, pattern, dropout=dropout, return_lse=len(pieces) > 1, backend=self.backend)
            for pattern, _ in pieces
        ]
        out: Any = merge(partials, [w for _, w in pieces])[0] if len(pieces) > 1 else partials[0]  # type: ignore[arg-type]
        return merge_heads(out), probabilities(q, k, pieces, None) if returns_probabilities else None

    def _paper(self, tokens: int) -> list[Weighted]:
        """The preset of the published pattern; texts of up to two blocks, all global, have full attention."""
        return [(full() if tokens <= 2 * self.block else bigbird(self.block, self.random, self.seed), 1.0)]

    def _fixed_links(self, tokens: int) -> tuple[Pattern, Pattern, Pattern]:
        """(inner rows without block 0, pairs with a key in block 0, rows that see every key)."""
        last = range((tokens - 1) // self.block * self.block, tokens)
        first = range(self.block)
        outer = sees_all([*first, *last])
        near = blocked_window(1, block=self.block) | seen_by_all(last)
        return near - seen_by_all(first), seen_by_all(first), outer

    def _evaluation(self, tokens: int) -> list[Weighted]:
        """Block 0 counts once as a global block and r times as a random one."""
        near, first, outer = self._fixed_links(tokens)
        return [(near | outer, 1.0), (first - outer, 1.0 + self.random)]

    def _training(self, tokens: int) -> list[Weighted]:
        """Random blocks of each head; a block that is a neighbour or global too counts twice."""
        near, first, outer = self._fixed_links(tokens)
        n = -(-tokens // self.block)
        if n not in self._drawn:
            while len(self._drawn) >= _MAX_CACHED_LENGTHS:
                del self._drawn[next(iter(self._drawn))]
            self._drawn[n] = training_blocks(self.original, n)
        drawn = self._drawn[n]
        query_block = torch.arange(n)[:, None]
        is_fixed = ((drawn - query_block).abs() <= 1) | (drawn == 0) | (drawn == n - 1)
        links = near | first | outer | chosen_blocks(torch.where(is_fixed, -1, drawn), block=self.block)
        if not bool((is_fixed & (drawn >= 0)).any()):
            return [(links, 1.0)]
        doubled = chosen_blocks(torch.where(is_fixed, drawn, -1), block=self.block)
        return [(links - doubled, 1.0), (doubled, 2.0)]


class PaddedText:
    """The length and padding of one batch, and the weighted patterns made for it, which layers share.

    `real`: `(B, N)` bool, False for padding; None where no token is.
    """

    def __init__(self, tokens: int, real: Tensor | None) -> None:
        self.tokens = tokens
        has_padding = real is not None and (torch.compiler.is_compiling() or not bool(real.all()))
        self.real = collapse_batch(real) if real is not None and has_padding else None
        self._pieces: dict[Any, list[Weighted]] = {}

    def pieces(self, name: Any, make: Any, zero_padding_rows: bool = True) -> list[Weighted]:
        """The patterns of `make()` without padding keys (and rows, with `zero_padding_rows`), cached by `name`."""
        if name not in self._pieces:
            self._pieces[name] = [(self._real(pattern, zero_padding_rows), weight) for pattern, weight in make()]
        return self._pieces[name]

    def _real(self, pattern: Pattern, zero_padding_rows: bool) -> Pattern:
        if self.real is None:
            return pattern
        pattern = padding(self.real) if pattern == full() else pattern & padding(self.real)
        return pattern - sees_all(~self.real) if zero_padding_rows else pattern


class _TextCache:
    """The `PaddedText` of the latest mask: every layer of a model receives the same one. Copies start empty."""

    def __init__(self) -> None:
        self._last: tuple[TensorVersion, PaddedText] | None = None

    def __reduce__(self) -> tuple[type[_TextCache], tuple[()]]:
        return _TextCache, ()

    def __call__(self, mask: Tensor) -> PaddedText:
        last = self._last
        if torch.compiler.is_compiling() or last is None or not last[0].is_unchanged(mask):
            text = PaddedText(mask.shape[3], mask[:, 0, 0, :].bool())
            if torch.compiler.is_compiling():
                return text
            self._last = last = TensorVersion(mask), text
        return last[1]
