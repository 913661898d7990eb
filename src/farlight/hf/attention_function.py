"""The attention function registered with transformers: a module's queries, keys, values, mask and keywords to its output.

One call does, in this order:

1. read the module's `Setting` (pattern or router, backend, observer) and its own mask as a `ModelMask`;
2. bring keys, values and mask to one length: empty slots of a static cache are cut off, and keys that a sliding cache has
   dropped are replaced by invisible zeros where the pattern counts positions from the first token;
3. intersect the model's mask, the pattern (a router is called here) and the key lists of the model's own indexer;
4. call `farlight.attention`, and merge attention sinks by the log-sum-exp.

A `SparseCache` holds keys of its own; its cache layer does steps 2 to 4. Everything a model passes is honoured exactly or
refused with UnsupportedError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from farlight.attention import attention
from farlight.errors import UnsupportedError
from farlight.hf.cached_tensors import CachedTensor, cache_layer_of
from farlight.hf.keyword_arguments import check_sinks, indexer_pattern, packed_documents, refuse_unknown
from farlight.hf.lazy_mask import LazyMask, ModelMask
from farlight.hf.masks import tensor_mask
from farlight.hf.model_score import model_score
from farlight.hf.positions import resolve_named_positions
from farlight.hf.probabilities import check_length, probabilities, wants_probabilities
from farlight.hf.setting import LayerPattern, Observation, setting_of
from farlight.hf.spread import attend_spread
from farlight.hf.tracing import refuse_jit_trace
from farlight.packed import is_translation_invariant
from farlight.patterns import causal, full, padding
from farlight.patterns.algebra import Intersection, looks_back
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router
from farlight.routing.gist import gist_attention
from farlight.routing.gist_router import Gist
from farlight.score import Score

__all__ = ["attention_forward", "mark_for_compilers"]


@dataclass(frozen=True)
class _Options:
    """Arguments of one attention call that do not depend on its keys."""

    scale: float | None
    dropout: float
    backend: str
    sinks: Tensor | None  # (H,) logits
    has_indexer: bool  # the model's own indexer lists the keys of each query
    score: Score | None = None  # softcap and position_bias of the model


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered with transformers: `(B, H, N, D)` in, `(B, N, H, D)` contiguous out.

    The second result is None, or under `output_attentions` the probabilities `(B, H, n_q, n_k)`.
    Raises UnsupportedError for every argument that cannot be honoured.
    """
    if torch.compiler.is_compiling() and (isinstance(attention_mask, LazyMask) or isinstance(key, CachedTensor)):
        return _outside_graph(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    refuse_jit_trace(module)
    refuse_unknown(module, kwargs)
    setting = setting_of(module)
    indices = next((kwargs[name] for name in ("indices", "block_indices") if kwargs.get(name) is not None), None)
    options = _Options(scaling, dropout, setting.backend, kwargs.get("s_aux"), indices is not None)
    cache_layer = cache_layer_of(module, key, value)
    _refuse_packed(module, kwargs, cache_layer is not None or setting.spread is not None or isinstance(setting.pattern, Gist))
    returns_probabilities = wants_probabilities(module, kwargs.get("output_attentions"))
    if returns_probabilities:
        check_length(module, query.shape[2], key.shape[2])
        _refuse_probabilities(module, cache_layer is not None or isinstance(setting.pattern, Gist))
    if cache_layer is not None and setting.has_layer_number:
        out = cache_layer.attend(
            module, query, key, value, attention_mask, setting.pattern, scaling, dropout,
            score_of=functools.partial(_score_of_text, module, kwargs, query), sinks=options.sinks, indices=indices,
        )  # fmt: skip
        return out, None
    mask = _placed(module, _model_mask(module, query, key, attention_mask, is_causal, kwargs.get("sliding_window")))
    if setting.pattern is not None and not isinstance(attention_mask, LazyMask | ModelMask | None):
        _refuse_hidden_end(module, mask, query.shape[2], key.shape[2])
    if not setting.has_layer_number:
        raise _unnumbered(module)
    if setting.spread is not None:
        if returns_probabilities or options.has_indexer or setting.observer is not None:
            raise UnsupportedError(
                f"{type(module).__name__} over ranks: output_attentions, key indexers and observers are not served; run it in "
                "one process."
            )
        score = model_score(module, kwargs, query.shape[1], query.shape[2], key.shape[2], mask.q_offset)
        out = attend_spread(
            module, setting.spread, mask.pattern, query, key, value, setting.pattern,
            scale=scaling, dropout=dropout, backend=setting.backend, sinks=options.sinks, score=score,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    num_columns = key.shape[2]
    key, value, mask = _with_dropped_keys(module, mask, setting.pattern, key, value, options.has_indexer)
    num_slots = key.shape[2]
    key, value = key[:, :, : mask.n_k], value[:, :, : mask.n_k]
    score = model_score(module, kwargs, query.shape[1], query.shape[2], key.shape[2], mask.q_offset)
    options = replace(options, score=score)
    call = Observation(module, query, key, value, scaling, mask.pattern, mask.q_offset, mask.key_real, score, options.sinks)
    observe_output = None if setting.observer is None else setting.observer(call)
    pattern = _layer_pattern(module, setting.pattern, mask, query, key)
    for links in (indexer_pattern(module, kwargs, query, key.shape[2]), packed_documents(module, kwargs, query, key)):
        pattern = pattern if links is None else pattern & links
    if isinstance(setting.pattern, Gist):
        out = _attend_gist(module, setting.pattern, mask, query, key, value, pattern, options)
    else:
        out = _attend(module, mask, query, key, value, pattern, options)
    if observe_output is not None:
        observe_output(out)
    weights = None
    if returns_probabilities:
        weights = probabilities(query, key, pattern, scaling, mask.q_offset, options.sinks, score)
        # Empty slots of a cache have probability 0; keys that a sliding cache dropped have no column.
        weights = functional.pad(weights, (0, num_slots - key.shape[2]))[..., num_slots - num_columns :]
    return out.transpose(1, 2).contiguous(), weights


def _score_of_text(module: nn.Module, kwargs: dict[str, Any], query: Tensor, total: int) -> Score | None:
    """The model's terms on the scores where the queries are the last of `total` tokens."""
    return model_score(module, kwargs, query.shape[1], query.shape[2], total, total - query.shape[2])


def mark_for_compilers() -> None:
    """Tell torch.compile which calls leave its graphs. Called by `register`, not at import: it loads a compiler."""
    global _outside_graph
    if _outside_graph is attention_forward:
        reason = "this mask was made outside the graph, and its values decide what is computed; compile without fullgraph=True"
        _outside_graph = torch.compiler.disable(attention_forward, reason=reason)


_outside_graph: Callable[..., tuple[Tensor, Tensor | None]] = attention_forward


# ---- attention ----------------------------------------------------------------------------------------------------------
def _attend(module: nn.Module, mask: ModelMask, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: _Options) -> Tensor:
    """`(B, H, n_q, D_v)`: attention with values of any head_dim, and with sinks in the softmax where the model has them."""
    sinks = None
    if options.sinks is not None:
        check_sinks(module, options.sinks, q.shape[1])
        sinks = options.sinks.flatten()
    out: Tensor = attention(
        q, k, v, pattern, scale=options.scale, q_offset=mask.q_offset, dropout=options.dropout, score=options.score,
        sinks=sinks, backend=options.backend,
    )  # fmt: skip
    return out


def _attend_gist(
    module: nn.Module, router: Gist, mask: ModelMask, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: _Options
) -> Tensor:
    """`(B, H, n_q, D_v)`: attention over `pattern` and the summaries of uncovered blocks that the model's mask allows."""
    supported = options.sinks is None and options.score is None and not options.has_indexer and not options.dropout
    if not supported or not _is_causality_and_padding(mask.pattern) or mask.q_offset != k.shape[2] - q.shape[2]:
        raise UnsupportedError(
            f"{type(module).__name__}: a gist of what is not seen knows full and causal attention over a text and its padding; "
            "this layer has sinks, terms on its scores, dropout, keys chosen by the model, or a mask of its own. Use the same "
            "router without "
            "gist(…)."
        )
    out = gist_attention(
        q, k, v, pattern, block=router.block, causal=looks_back(mask.pattern), key_mask=mask.key_real, scale=options.scale,
        backend=options.backend,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


# ---- masks and patterns ---------------------------------------------------------------------------------------------------
def _model_mask(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    mask: ModelMask | Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> ModelMask:
    """The model's own mask, from what it passes: a `LazyMask`, a written-out tensor, or None with the causality flag."""
    n_q, n_k = q.shape[2], k.shape[2]
    if isinstance(mask, ModelMask):
        return mask
    if isinstance(mask, LazyMask):
        if mask.shape[2:] != (n_q, n_k):
            raise UnsupportedError(
                f"{type(module).__name__} attends with {n_q} queries to {n_k} keys under a mask made for {mask.shape[2]} and "
                f"{mask.shape[3]}; what the others may see is unknown. Use 'eager' or 'sdpa' for this model."
            )
        return mask.model_mask
    if isinstance(mask, Tensor):
        return tensor_mask(mask, n_q, n_k, q.shape[0] if mask.shape[0] == 1 else None)
    if mask is not None:
        raise UnsupportedError(
            f"{type(module).__name__} passes a mask of type {type(mask).__name__}, which was built for another "
            "attention implementation; set attn_implementation='farlight' on the whole model."
        )
    # Without a mask the flag decides, as with SDPA. A single query is the newest token and sees every key.
    causal_flag = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if sliding_window is not None or (causal_flag and 1 < n_q != n_k):
        restriction = (
            f"a sliding window of {sliding_window}"
            if sliding_window is not None
            else f"causality for {n_q} queries and {n_k} keys"
        )
        raise UnsupportedError(
            f"{type(module).__name__} needs {restriction} but passes no mask, so where its queries stand is unknown; pass "
            "an attention_mask to the model."
        )
    return ModelMask(causal() if causal_flag and n_q > 1 else full(), n_k - n_q)


def _placed(module: nn.Module, mask: ModelMask) -> ModelMask:
    """The mask; between decoder and encoder with the decoder's position, since transformers counts from 0 in each call."""
    setting = setting_of(module)
    if setting.position is None or setting.part == "encoder":
        return mask
    if setting.part == "decoder":
        setting.position.first_query = mask.q_offset + mask.num_dropped
        return mask
    parts = mask.pattern.parts if isinstance(mask.pattern, Intersection) else [mask.pattern]
    if setting.position.first_query is None or not all(isinstance(part, full | padding) for part in parts):
        raise UnsupportedError(
            f"{type(module).__name__} attends to another text under {mask.pattern!r}, before its decoder's own attention or by "
            "a mask of pairs; patterns between two texts need padding alone and the position of the queries. Leave 'cross' out."
        )
    return replace(mask, q_offset=setting.position.first_query)


def _layer_pattern(module: nn.Module, pattern: LayerPattern, mask: ModelMask, q: Tensor, k: Tensor) -> Pattern:
    """The intersection of the model's mask and the layer's pattern; a router chooses its pattern here."""
    if pattern is None:
        return mask.pattern
    if isinstance(pattern, Router):
        if mask.q_offset != k.shape[2] - q.shape[2]:
            raise UnsupportedError(
                f"{type(module).__name__}: a router takes the queries for the last tokens of the text, but here {q.shape[2]} "
                f"queries from position {mask.q_offset} stand before some of the {k.shape[2]} keys. Pass a pattern, or a "
                "cache that holds only what has been read."
            )
        routed: Pattern = pattern(q, k, key_mask=mask.key_real, query_mask=mask.query_real)
        pattern = routed
    text_real = mask.key_real if mask.text_real is None else mask.text_real
    pattern = resolve_named_positions(pattern, text_real, k.shape[2])
    return pattern if mask.pattern.text == full().text else mask.pattern & pattern


def _with_dropped_keys(
    module: nn.Module, mask: ModelMask, pattern: LayerPattern, key: Tensor, value: Tensor, has_indexer: bool
) -> tuple[Tensor, Tensor, ModelMask]:
    """Keys, values and mask counted from the first token, where a sliding cache has dropped keys and positions matter."""
    if not mask.num_dropped or (_is_translation_invariant(pattern) and not has_indexer):
        return key, value, mask
    if mask.with_dropped_keys is None or has_indexer:
        raise UnsupportedError(
            f"{type(module).__name__}: the cache has dropped the first {mask.num_dropped} keys, so that positions in the "
            "pattern no longer match; generate with a cache that keeps every key, or without a pattern."
        )
    # Zeros stand for the dropped keys; the mask hides them from every query.
    key, value = (functional.pad(x, (0, 0, mask.num_dropped, 0)) for x in (key, value))
    return key, value, mask.with_dropped_keys()


def _is_translation_invariant(pattern: LayerPattern) -> bool:
    """Whether a pattern is a function of the distance j - i alone, so that it does not matter where counting starts."""
    return pattern is None or (isinstance(pattern, Pattern) and is_translation_invariant(pattern))


def _is_causality_and_padding(pattern: Pattern) -> bool:
    """Whether a model's mask consists of causality and padding only."""
    if isinstance(pattern, Intersection):
        return all(_is_causality_and_padding(part) for part in pattern.parts)
    return isinstance(pattern, full | causal | padding)


def _refuse_hidden_end(module: nn.Module, mask: ModelMask, n_q: int, n_k: int) -> None:
    """Raise where a written-out mask hides the last keys: its queries are then not the last tokens, at unknown positions."""
    if n_q < n_k and not torch.compiler.is_compiling() and mask.key_real is not None and not bool(mask.key_real[:, -1].any()):
        raise UnsupportedError(
            f"{type(module).__name__}: the attention mask hides the last of {n_k} keys from all {n_q} queries, as a static "
            "cache does, so that the positions of the queries in the pattern are unknown; pass a 2-D attention_mask, and "
            "sparsify the whole model that generates."
        )


def _unnumbered(module: nn.Module) -> UnsupportedError:
    return UnsupportedError(
        f"{type(module).__name__} computes attention, but has no layer number, so that a mapping {{layer: pattern}} does "
        "not say what it should run under; pass one pattern for the whole model."
    )


def _refuse_probabilities(module: nn.Module, has_no_matrix: bool) -> None:
    """Raise where `output_attentions` cannot be honoured, because no matrix of queries and keys exists."""
    if has_no_matrix:
        raise UnsupportedError(
            f"output_attentions=True needs the attention probabilities of {type(module).__name__}, but under a SparseCache or "
            "a gist there is no matrix of queries and keys; use another cache and router, or leave the option out."
        )


def _refuse_packed(module: nn.Module, kwargs: dict[str, Any], unread: bool) -> None:
    """Raise where the lengths of packed sequences meet a SparseCache, ranks or a gist, which leave them unread."""
    if unread and (kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None):
        raise UnsupportedError(
            f"{type(module).__name__} passes cu_seq_lens_q, packed sequences, which a SparseCache, ranks and a gist do not "
            "read; run one sequence after another."
        )
