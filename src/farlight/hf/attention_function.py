"""The attention function that transformers calls: from a module's queries, keys, mask and extras to its output.

What a model passes is honoured exactly or refused; nothing is left out without a word. The pattern to run under is kept on
the model's own modules, where recomputation during the backward pass and other threads find it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from farlight.errors import UnsupportedError
from farlight.hf.cached_tensors import cache_layer_of
from farlight.hf.keyword_arguments import chosen_by_the_model, refuse_unknown, sinks_merged
from farlight.hf.lazy_mask import LazyMask, ModelMask
from farlight.hf.masks import tensor_mask
from farlight.hf.positions import in_each_text
from farlight.hf.probabilities import check_length, probabilities, wants_probabilities
from farlight.hf.tracing import refuse_jit_trace
from farlight.patterns import causal, full, offsets, padding, strided, window
from farlight.patterns.algebra import Intersection, looks_back
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router
from farlight.routing.gist import gist_attention
from farlight.routing.gist_router import Gist

__all__ = ["SETTING", "Chosen", "Observation", "Setting", "attention_forward"]

Chosen = Pattern | Router | None
SETTING = "_farlight_setting"


@dataclass(frozen=True)
class Observation:
    """One call of a layer's attention, as `use_pattern`'s observer sees it before it runs.

    `q` is `(B, H, n_q, D)`, `k` and `v` are `(B, H_kv, n_k, D)`; `own` is what the model itself allows, and `scale` is
    the factor on the scores (None = D^-0.5). `key_real` `(B, n_k)` is False for padding, None where nothing is padded.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    own: Pattern
    q_offset: int
    key_real: Tensor | None = None


@dataclass(frozen=True)
class Setting:
    """What a module's attention is to run under."""

    chosen: Pattern | Router | None = None
    backend: str = "auto"
    observer: Callable[[Observation], None] | None = None
    numbered: bool = True  # False: patterns are given by layer number, and this module has none

    def __reduce__(self) -> tuple[Any, ...]:
        from farlight.hf.interface import settled_again

        return settled_again, (self.chosen, self.backend, self.observer, self.numbered)


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
    """
    if torch.compiler.is_compiling() and isinstance(attention_mask, LazyMask):
        return _left_graph(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    refuse_jit_trace(module)
    refuse_unknown(module, kwargs)
    setting: Setting = module.__dict__.get(SETTING) or Setting()
    sinks = kwargs.get("s_aux")
    indices = next((kwargs[name] for name in ("indices", "block_indices") if kwargs.get(name) is not None), None)
    kept = cache_layer_of(module, key, value)
    wanted = wants_probabilities(module, kwargs.get("output_attentions"))
    if wanted:
        check_length(module, query.shape[2], key.shape[2])
        _refuse_probabilities(module, kept is not None or isinstance(setting.chosen, Gist))
    if kept is not None and setting.numbered:
        more = {"sinks": sinks, "indices": indices}
        return kept.attend(module, query, key, value, attention_mask, setting.chosen, scaling, dropout, **more), None
    columns = key.shape[2]
    own = _own_mask(module, query, key, attention_mask, is_causal, kwargs.get("sliding_window"))
    if setting.chosen is not None and not isinstance(attention_mask, LazyMask | ModelMask | None):
        _refuse_open_end(module, own, query.shape[2], key.shape[2])
    if not setting.numbered:
        raise UnsupportedError(
            f"{type(module).__name__} computes attention, but has no layer number, so that a mapping {{layer: pattern}} does "
            "not say what it should run under; pass one pattern for the whole model."
        )
    key, value, own = _with_dropped(module, own, setting.chosen, key, value, indices is not None)
    held = key.shape[2]
    key, value = key[:, :, : own.n_k], value[:, :, : own.n_k]
    if setting.observer is not None:
        setting.observer(Observation(module, query, key, value, scaling, own.pattern, own.q_offset, own.key_real))
    pattern = _joined(module, setting.chosen, own, query, key)
    listed = chosen_by_the_model(module, kwargs, query, key.shape[2])
    if listed is not None:
        pattern = pattern & listed
    options: dict[str, Any] = {"q_offset": own.q_offset, "dropout": dropout, "backend": setting.backend}
    if isinstance(setting.chosen, Gist):
        if sinks is not None or indices is not None:
            raise _no_summary(module)
        out = _in_summary(module, setting.chosen, own, query, key, value, pattern, options | {"scale": scaling})
    else:
        out = _attended(module, query, key, value, pattern, scaling, sinks, options)
    weights = None
    if wanted:
        weights = probabilities(query, key, pattern, scaling, own.q_offset, sinks)
        # Empty slots of a cache are seen by nobody; keys that a sliding cache dropped have no column.
        weights = torch.nn.functional.pad(weights, (0, held - key.shape[2]))[..., held - columns :]
    return out.transpose(1, 2).contiguous(), weights


def _attended(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float | None,
    sinks: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention with values of any width, and with a sink in the softmax where there is one."""
    import farlight

    width = v.shape[3]
    q, k, v, scale = _of_one_width(q, k, v, scale)
    out: Tensor | tuple[Tensor, Tensor]
    if sinks is None:
        out = farlight.attention(q, k, v, pattern, scale=scale, **options)
    else:
        out, lse = farlight.attention(q, k, v, pattern, scale=scale, return_lse=True, **options)
        out = sinks_merged(module, out, lse, sinks)
    assert isinstance(out, Tensor)
    return out[..., :width]


def mark_for_compilers() -> None:
    """Tell torch.compile what to leave outside its graphs. Not at import: it loads a compiler."""
    global _left_graph
    if _left_graph is attention_forward:
        reason = "this mask was made outside the graph, and its values decide what is computed; compile without fullgraph=True"
        _left_graph = torch.compiler.disable(attention_forward, reason=reason)


_left_graph: Callable[..., tuple[Tensor, Tensor | None]] = attention_forward


def _refuse_open_end(module: nn.Module, own: ModelMask, n_q: int, n_k: int) -> None:
    """Raise where a written-out mask shows that its queries are not the last tokens: no pattern knows where they stand."""
    if n_q < n_k and not torch.compiler.is_compiling() and own.key_real is not None and not bool(own.key_real[:, -1].any()):
        raise UnsupportedError(
            f"{type(module).__name__}: the attention mask hides the last of {n_k} keys from all {n_q} queries, as a static "
            "cache does, so that the positions of the queries in the pattern are unknown; pass a 2-D attention_mask, and "
            "sparsify the whole model that generates."
        )


def _refuse_probabilities(module: nn.Module, without_matrix: bool) -> None:
    if without_matrix:
        raise UnsupportedError(
            f"output_attentions=True asks {type(module).__name__} for the attention probabilities, but under a SparseCache or "
            "a gist there is no matrix of queries and keys; use another cache and router, or leave the option out."
        )


def _with_dropped(
    module: nn.Module, own: ModelMask, chosen: Chosen, key: Tensor, value: Tensor, listed: bool
) -> tuple[Tensor, Tensor, ModelMask]:
    """Keys, values and mask with positions that count from the first token, where a cache has dropped some that matter."""
    if not own.dropped or (_moves(chosen) and not listed):
        return key, value, own
    if own.whole is None or listed:
        raise UnsupportedError(
            f"{type(module).__name__}: the cache has dropped the first {own.dropped} keys, so that positions in the "
            "pattern no longer match; generate with a cache that keeps every key, or without a pattern."
        )
    # What stands in the place of dropped keys is seen by nobody.
    key, value = (torch.nn.functional.pad(x, (0, 0, own.dropped, 0)) for x in (key, value))
    return key, value, own.whole()


def _in_summary(
    module: nn.Module,
    chosen: Gist,
    own: ModelMask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    options: dict[str, Any],
) -> Tensor:
    """Attention that also hears the blocks it does not see, as far as the model itself would let it see them."""
    if options["dropout"] or not _bare(own.pattern) or own.q_offset != k.shape[2] - q.shape[2]:
        raise _no_summary(module)
    width = v.shape[3]
    q, k, v, scale = _of_one_width(q, k, v, options["scale"])
    out = gist_attention(
        q, k, v, pattern, block=chosen.block, causal=looks_back(own.pattern), key_mask=own.key_real, scale=scale,
        backend=options["backend"],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[..., :width]


def _no_summary(module: nn.Module) -> UnsupportedError:
    return UnsupportedError(
        f"{type(module).__name__}: a gist of what is not seen knows full and causal attention over a text and its padding; "
        "this layer has sinks, dropout, keys chosen by the model, or a mask of its own. Use the same router without gist(…)."
    )


def _bare(own: Pattern) -> bool:
    """Whether a model's mask says nothing but causality and padding."""
    if isinstance(own, Intersection):
        return all(_bare(part) for part in own.parts)
    return isinstance(own, full | causal | padding)


def _joined(module: nn.Module, chosen: Chosen, own: ModelMask, q: Tensor, k: Tensor) -> Pattern:
    """What is allowed by the model and by what was chosen for this layer."""
    if chosen is None:
        return own.pattern
    if isinstance(chosen, Router):
        if own.q_offset != k.shape[2] - q.shape[2]:
            raise UnsupportedError(
                f"{type(module).__name__}: a router takes the queries for the last tokens of the text, but here {q.shape[2]} "
                f"queries from position {own.q_offset} stand before some of the {k.shape[2]} keys. Pass a pattern, or a "
                "cache that holds only what has been read."
            )
        found: Pattern = chosen(q, k, key_mask=own.key_real, query_mask=own.query_real)
        chosen = found
    chosen = in_each_text(chosen, own.key_real if own.text is None else own.text, k.shape[2])
    return chosen if own.pattern.text == full().text else own.pattern & chosen


def _moves(chosen: Chosen) -> bool:
    """Whether a pattern only looks at the distance of two tokens, so that it does not matter where counting starts."""
    return chosen is None or (
        isinstance(chosen, Pattern)
        and all(
            isinstance(atom, full | causal | window | offsets) or (isinstance(atom, strided) and atom.phase is None)
            for atom in chosen.atoms()
        )
    )


def _of_one_width(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """Queries, keys and values of one head_dim: zeros change neither scores nor the part of the output that is kept."""
    short = k.shape[3] - v.shape[3]
    if short > 0:
        return q, k, torch.nn.functional.pad(v, (0, short)), scale
    if short < 0:
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return torch.nn.functional.pad(q, (0, -short)), torch.nn.functional.pad(k, (0, -short)), v, scale
    return q, k, v, scale


def _own_mask(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    mask: ModelMask | Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> ModelMask:
    """What the model allows by itself."""
    n_q, n_k = q.shape[2], k.shape[2]
    if isinstance(mask, ModelMask):
        return mask
    if isinstance(mask, LazyMask):
        if mask.shape[2:] != (n_q, n_k):
            raise UnsupportedError(
                f"{type(module).__name__} attends with {n_q} queries to {n_k} keys under a mask made for {mask.shape[2]} and "
                f"{mask.shape[3]}; what the others may see is unknown. Use 'eager' or 'sdpa' for this model."
            )
        return mask.own
    if isinstance(mask, Tensor):
        return tensor_mask(mask, n_q, n_k, q.shape[0] if mask.shape[0] == 1 else None)
    if mask is not None:
        raise UnsupportedError(
            f"{type(module).__name__} passes a mask of type {type(mask).__name__}, which was built for another "
            "attention implementation; set attn_implementation='farlight' on the whole model."
        )
    # No mask at all: the model relies on the flag, as with SDPA. A single query is the newest token and
    # sees everything.
    past_only = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if sliding_window is not None or (past_only and 1 < n_q != n_k):
        what = (
            f"a sliding window of {sliding_window}"
            if sliding_window is not None
            else f"causality for {n_q} queries and {n_k} keys"
        )
        raise UnsupportedError(
            f"{type(module).__name__} asks for {what} but passes no mask, so where its queries stand is unknown; pass "
            "an attention_mask to the model."
        )
    return ModelMask(causal() if past_only and n_q > 1 else full(), n_k - n_q)
