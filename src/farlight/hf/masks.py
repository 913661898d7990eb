"""The mask function registered with transformers: a model's own mask as a `ModelMask`.

A model describes its mask (causality, sliding window, chunks, packed sequences) by a Python function on indices plus a key
padding mask. `farlight.hf.mask_rules` turns the function into a pattern; padding becomes `padding(real)`. No restriction of
the model is ever lost. The user's sparse pattern is not applied here, but in the attention function.

Under torch.compile and torch.export the values of masks are unknown. There the padding stays a tensor inside the pattern, and
a mask that depends on values (a static cache, a long packed text) leaves the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from farlight.errors import UnsupportedError
from farlight.hf.lazy_mask import LazyMask, ModelMask
from farlight.hf.mask_rules import MaskFunction, MaskRule, evaluate_mask_function, recognise
from farlight.hf.tracing import refuse_jit_trace
from farlight.patterns import causal, full, padding, pairs
from farlight.patterns.expression import Pattern

__all__ = ["mark_for_compilers", "model_mask", "tensor_mask"]

# Pairs up to which a compiled program evaluates a mask function inside its graph; beyond, the graph is left.
_MAX_PAIRS_IN_GRAPH = 1 << 24
_BIAS = (
    "the model passed an attention mask that adds values other than 0 and minus infinity to the scores: a bias, which a "
    "pattern cannot express. Use attn_implementation='sdpa' or 'eager' for this model."
)


@dataclass(frozen=True)
class _MaskCall:
    """The arguments with which transformers calls a mask function. Query row r stands at position q_offset + r, key column
    c at kv_offset + c; `attention_mask` `(B, tokens)` is the padding mask of the whole text.
    """

    batch: int
    n_q: int
    n_k: int
    q_offset: int | Tensor
    kv_offset: int
    function: MaskFunction | None
    attention_mask: Tensor | None
    kwargs: dict[str, Any]


def model_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> LazyMask | ModelMask:
    """The mask function registered with transformers; its arguments are those of transformers' `sdpa_mask`.

    Returns a `LazyMask`, never None: what a missing mask means depends on the model. While a program is traced it is the
    `ModelMask` itself, with the padding as a tensor.
    """
    call = _MaskCall(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, kwargs)
    if torch.compiler.is_compiling():
        return _traced_mask(call)
    refuse_jit_trace()
    return _lazy_mask(call)


def _lazy_mask(call: _MaskCall) -> LazyMask:
    return LazyMask(_read_mask(call), call.batch, call.n_q, call.n_k, call.kwargs.get("device", "cpu"))


def mark_for_compilers() -> None:
    """Tell torch.compile which calls leave its graphs and which it evaluates while tracing.

    Called by `register`, not at import: it loads a compiler.
    """
    global _outside_graph, _constant_limits
    if _outside_graph is _lazy_mask:
        reason = (
            "the values of this mask decide what is computed (a static cache, or a long packed text): pass an "
            "attention_mask, or compile without fullgraph=True"
        )
        _outside_graph = torch.compiler.disable(_lazy_mask, reason=reason)
        _constant_limits = torch.compiler.assume_constant_result(_limits)


def _limits(function: MaskFunction) -> tuple[int | None, int | None]:
    """(left, right) of the rule of a function without tensors; (None, None) when the rule is unknown or has groups."""
    rule = recognise(function)
    return (None, None) if rule is None or rule.groups is not None else (rule.left, rule.right)


_outside_graph: Callable[[_MaskCall], LazyMask] = _lazy_mask
_constant_limits: Callable[[MaskFunction], tuple[int | None, int | None]] = _limits


def _traced_mask(call: _MaskCall) -> LazyMask | ModelMask:
    """The mask inside a graph. The rule of a mask function is read while tracing, where the function captures no tensor."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    batch, n_q, n_k, q_offset, function = call.batch, call.n_q, call.n_k, call.q_offset, call.function
    if isinstance(q_offset, Tensor) or call.kv_offset:
        return _outside_graph(call)
    pattern: Pattern | None = None
    if function is None or function is causal_mask_function:
        pattern = causal()
    elif function is bidirectional_mask_function:
        pattern = full()
    elif not torch.compiler.is_dynamo_compiling():  # torch.export runs this function as plain Python
        rule = recognise(function)
        pattern = None if rule is None else rule.pattern(n_k, 0)
    elif _captures_no_tensor(call.kwargs):
        left, right = _constant_limits(function)
        pattern = None if right is None else MaskRule(left, right).pattern(n_k, 0)
    if pattern is None:
        if batch * n_q * n_k > _MAX_PAIRS_IN_GRAPH or (n_q == n_k and q_offset != 0):
            return _outside_graph(call)
        assert function is not None
        pattern = evaluate_mask_function(batch, n_q, n_k, q_offset, 0, function, call.kwargs)
    if call.attention_mask is None:
        return ModelMask(pattern, q_offset)
    _check_batch(batch, call.attention_mask, "attention_mask")
    real = call.attention_mask.to(torch.bool)
    real = functional.pad(real, (0, max(0, n_k - real.shape[1])))[:, :n_k]
    return ModelMask(pattern & padding(real), q_offset, key_real=real)


def _captures_no_tensor(kwargs: dict[str, Any]) -> bool:
    """Whether transformers composed the mask function of rules alone; it then allows SDPA to leave the mask out."""
    skippable = kwargs.get("allow_is_causal_skip") or kwargs.get("allow_is_bidirectional_skip")
    chunked = getattr(kwargs.get("config"), "attention_chunk_size", None) is not None
    return bool(skippable) and not chunked and not kwargs.get("use_vmap")


def _read_mask(call: _MaskCall) -> ModelMask:
    """The model's mask: the rule or evaluation of its mask function, and the real keys of `attention_mask`."""
    from transformers.masking_utils import causal_mask_function

    batch, n_q, n_k, attention_mask = call.batch, call.n_q, call.n_k, call.attention_mask
    q_offset, num_dropped = int(call.q_offset), int(call.kv_offset)
    function = causal_mask_function if call.function is None else call.function
    rule = recognise(function)
    _check_batch(batch, attention_mask, "attention_mask")
    if rule is not None and rule.groups is not None:
        group_rows = rule.groups if isinstance(rule.groups, Tensor) else rule.groups[1]
        _check_batch(batch, group_rows, "mask of packed or chunked texts")
    if rule is not None and isinstance(rule.groups, Tensor) and rule.groups.shape[-1] != n_k:
        rule = None
    if rule is None:
        num_visible = n_k
        pattern = evaluate_mask_function(batch, n_q, n_k, q_offset, num_dropped, function, call.kwargs)
    else:
        num_visible = max(0, min(n_k, q_offset - num_dropped + n_q)) if rule.right == 0 else n_k
        pattern = rule.pattern(num_visible, num_dropped)
    real = None
    if attention_mask is not None:
        real = attention_mask.to(torch.bool)[:, num_dropped : num_dropped + num_visible]
        # Keys past the end of the mask are empty slots of a cache.
        real = functional.pad(real, (0, num_visible - real.shape[1]))
        if bool(real.all()):
            real = None
        else:
            pattern = pattern & padding(real) if pattern.text != full().text else padding(real)
    with_dropped_keys = (lambda: _count_dropped_keys(call, num_dropped, num_visible)) if num_dropped else None
    return ModelMask(pattern, q_offset - num_dropped, num_dropped, num_visible, real, with_dropped_keys=with_dropped_keys)


def _count_dropped_keys(call: _MaskCall, num_dropped: int, num_visible: int) -> ModelMask:
    """The mask over `num_dropped` + n_k keys, the dropped ones visible to no query but counted as tokens of the text."""
    text = call.attention_mask
    text = torch.ones(call.batch, num_dropped + call.n_k, dtype=torch.bool) if text is None else text.bool()
    text = text.to(call.kwargs.get("device", text.device))
    in_cache = torch.arange(text.shape[1], device=text.device) >= num_dropped
    mask = _read_mask(replace(call, n_k=num_dropped + call.n_k, kv_offset=0, attention_mask=text & in_cache))
    text = functional.pad(text, (0, max(0, num_dropped + num_visible - text.shape[1])))
    return replace(mask, text_real=text[:, : mask.n_k])


def _check_batch(batch: int, mask: Tensor | None, name: str) -> None:
    """Raise unless the mask has one row for each text; a single row would be broadcast to texts it was not made for."""
    if mask is not None and mask.shape[0] != batch:
        raise UnsupportedError(
            f"the model passed the {name} of {mask.shape[0]} texts for a batch of {batch}; pass one row for each text "
            "(attention_mask.expand(batch, -1) where all are alike)."
        )


def tensor_mask(mask: Tensor, n_q: int, n_k: int, batch: int | None = None) -> ModelMask:
    """A written-out mask `(B|1, H|1, n_q|1, n_k)`: bool (True = allowed) or additive (0 = allowed, very negative = not).

    `batch`: the number of texts that a mask with one leading row stands for. Raises UnsupportedError for another shape, and for
    an additive mask that holds a bias.
    """
    if mask.dim() == 4 and mask.shape[2] == 1:  # one row for all queries: padding, as LayoutLM writes it
        mask = mask.expand(-1, -1, n_q, -1)
    if mask.dim() != 4 or mask.shape[2:] != (n_q, n_k):
        raise UnsupportedError(
            f"the model passed an attention mask of shape {tuple(mask.shape)} for {n_q} queries and {n_k} keys; "
            f"farlight reads masks of shape (batch, heads, {n_q}, {n_k}). Pass a 2-D padding mask to the model, or "
            "one of that shape."
        )
    if mask.dtype != torch.bool:
        allowed = mask == 0
        # Half of the smallest number: sums of several "minus infinities" are at least that low.
        is_binary = (allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()
        if torch.compiler.is_compiling():
            torch._assert_async(is_binary, _BIAS)
        elif not bool(is_binary):
            raise UnsupportedError(_BIAS)
        mask = allowed
    # A key that no query sees is padding, and so is a query that sees no key.
    key_real, query_real = mask.any(2).any(1), mask.any(3).any(1)
    if batch is not None:
        key_real, query_real = key_real.expand(batch, -1), query_real.expand(batch, -1)
    return ModelMask(pairs(mask), n_k - n_q, key_real=key_real, query_real=query_real)
