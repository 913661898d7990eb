"""What a Hugging Face model itself allows, as a pattern.

A model describes its own mask (causal, sliding window, padding, packed sequences) by a Python function on indices plus
a key padding mask. Evaluating that function gives an n² tensor; recognising it gives a pattern that costs nothing. The
functions that transformers itself composes are recognised; any other is evaluated, which is exact and quadratic, so
that no restriction is ever lost. What a user's sparse pattern adds is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from farlight.errors import UnsupportedError
from farlight.hf.lazy_mask import LazyMask, ModelMask
from farlight.hf.tracing import refuse_jit_trace
from farlight.patterns import causal, documents, full, padding, pairs, window
from farlight.patterns.expression import Pattern

__all__ = ["mark_for_compilers", "model_mask", "read_mask", "tensor_mask"]

# Pairs up to which a compiled program evaluates a mask function inside its graph; beyond, the graph is left.
_EVALUATED_IN_GRAPH = 1 << 24
_BIAS = (
    "the model passed an attention mask that adds values other than 0 and minus infinity to the scores: a bias, which a "
    "pattern cannot express. Use attn_implementation='sdpa' or 'eager' for this model."
)
# Pairs that an unknown mask function may be evaluated on: 16 384 tokens, 256 MiB of bool.
_EVALUATED = 1 << 28


def model_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> LazyMask | ModelMask:
    """The mask function registered with transformers: its own arguments in, a tensor that holds a `ModelMask` out.

    Never None: what a missing mask would mean depends on the model. In a program that is being traced it is the
    `ModelMask` itself, with the padding as a table, whose values are unknown.
    """
    given = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, kwargs)
    if torch.compiler.is_compiling():
        return _traced_mask(*given)
    refuse_jit_trace()
    return _lazy_mask(*given)


def _lazy_mask(
    batch: int,
    n_q: int,
    n_k: int,
    q_offset: int | Tensor,
    kv_offset: int,
    function: Callable[..., Any] | None,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> LazyMask:
    own = read_mask(batch, n_q, n_k, int(q_offset), int(kv_offset), function, attention_mask, kwargs)
    return LazyMask(own, batch, n_q, n_k, kwargs.get("device", "cpu"))


def mark_for_compilers() -> None:
    """Tell torch.compile what to leave outside its graphs and what to ask while tracing; at import it would load a compiler."""
    global _left_graph, _limits
    if _left_graph is _lazy_mask:
        reason = (
            "the values of this mask decide what is computed (a static cache, or a long packed text): pass an "
            "attention_mask, or compile without fullgraph=True"
        )
        _left_graph = torch.compiler.disable(_lazy_mask, reason=reason)
        _limits = torch.compiler.assume_constant_result(_read_limits)


def _traced_mask(
    batch: int,
    n_q: int,
    n_k: int,
    q_offset: int | Tensor,
    kv_offset: int,
    function: Callable[..., Any] | None,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> LazyMask | ModelMask:
    """The mask inside a graph. Which rule a function stands for is asked while tracing, where it holds no tensor."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if isinstance(q_offset, Tensor) or kv_offset:
        return _left_graph(batch, n_q, n_k, q_offset, kv_offset, function, attention_mask, kwargs)
    pattern: Pattern | None = None
    if function is None or function is causal_mask_function:
        pattern = causal()
    elif function is bidirectional_mask_function:
        pattern = full()
    elif not torch.compiler.is_dynamo_compiling():  # torch.export runs this function as it is
        rule = _recognise(function)
        pattern = None if rule is None else rule.pattern(n_k, 0)
    elif _holds_no_tensor(kwargs):
        left, right = _limits(function)
        pattern = None if right is None else _Rule(left, right).pattern(n_k, 0)
    if pattern is None:
        if batch * n_q * n_k > _EVALUATED_IN_GRAPH or (n_q == n_k and q_offset != kv_offset):
            return _left_graph(batch, n_q, n_k, q_offset, kv_offset, function, attention_mask, kwargs)
        assert function is not None
        pattern = _evaluate(batch, n_q, n_k, q_offset, kv_offset, function, kwargs)
    if attention_mask is None:
        return ModelMask(pattern, q_offset)
    _check_batch(batch, attention_mask, "attention_mask")
    real = attention_mask.to(torch.bool)
    real = torch.nn.functional.pad(real, (0, max(0, n_k - real.shape[1])))[:, :n_k]
    return ModelMask(pattern & padding(real), q_offset, key_real=real)


def _holds_no_tensor(kwargs: dict[str, Any]) -> bool:
    """Whether transformers made the mask function of rules alone: it then lets SDPA leave the mask out, and says so."""
    plain = kwargs.get("allow_is_causal_skip") or kwargs.get("allow_is_bidirectional_skip")
    chunked = getattr(kwargs.get("config"), "attention_chunk_size", None) is not None
    return bool(plain) and not chunked and not kwargs.get("use_vmap")


def _read_limits(function: Callable[..., Any]) -> tuple[int | None, int | None]:
    """How far the rule that a function without tensors stands for looks back and ahead; (None, None) when it is unknown."""
    rule = _recognise(function)
    return (None, None) if rule is None or rule.groups is not None else (rule.left, rule.right)


_left_graph: Callable[..., LazyMask] = _lazy_mask
_limits: Callable[..., tuple[int | None, int | None]] = _read_limits


def read_mask(
    batch: int,
    n_q: int,
    n_k: int,
    offset: int,
    dropped: int,
    function: Callable[..., Any] | None,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> ModelMask:
    """What a model allows: the rule that `function` stands for, and the real keys of `attention_mask` `(B, tokens)`."""
    from transformers.masking_utils import causal_mask_function

    function = causal_mask_function if function is None else function
    rule = _recognise(function)
    _check_batch(batch, attention_mask, "attention_mask")
    if rule is not None and rule.groups is not None:
        _check_batch(
            batch, rule.groups if isinstance(rule.groups, Tensor) else rule.groups[1], "mask of packed or chunked texts"
        )
    if rule is not None and isinstance(rule.groups, Tensor) and rule.groups.shape[-1] != n_k:
        rule = None
    if rule is None:
        seen, pattern = n_k, _evaluate(batch, n_q, n_k, offset, dropped, function, kwargs)
    else:
        seen = max(0, min(n_k, offset - dropped + n_q)) if rule.right == 0 else n_k
        pattern = rule.pattern(seen, dropped)
    real = None
    if attention_mask is not None:
        real = attention_mask.to(torch.bool)[:, dropped : dropped + seen]
        # Keys past the end of the mask are slots of a cache that nothing has been written to.
        real = torch.nn.functional.pad(real, (0, seen - real.shape[1]))
        if bool(real.all()):
            real = None
        else:
            pattern = pattern & padding(real) if pattern.text != full().text else padding(real)

    def whole() -> ModelMask:
        held = torch.ones(batch, dropped + n_k, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        device = kwargs.get("device", held.device)
        kept = torch.arange(held.shape[1], device=device) >= dropped
        found = read_mask(batch, n_q, dropped + n_k, offset, 0, function, held.to(device) & kept, kwargs)
        text = torch.nn.functional.pad(held.to(device), (0, max(0, dropped + seen - held.shape[1])))
        return replace(found, text=text[:, : found.n_k])

    return ModelMask(pattern, offset - dropped, dropped, seen, real, whole=whole if dropped else None)


def _check_batch(batch: int, given: Tensor | None, name: str) -> None:
    """Raise where a mask is not one for each text. One of a single row would say of every text what it says of the first."""
    if given is not None and given.shape[0] != batch:
        raise UnsupportedError(
            f"the model passed the {name} of {given.shape[0]} texts for a batch of {batch}; pass one row for each text "
            "(attention_mask.expand(batch, -1) where all are alike)."
        )


def tensor_mask(mask: Tensor, n_q: int, n_k: int, batch: int | None = None) -> ModelMask:
    """A mask that the model's caller made: bool (True = allowed) or additive (0 = allowed, very negative = not).

    Its leading dimensions may be 1, which stands for all texts and heads, as in torch's own attention.
    """
    if mask.dim() != 4 or mask.shape[2:] != (n_q, n_k):
        raise UnsupportedError(
            f"the model passed an attention mask of shape {tuple(mask.shape)} for {n_q} queries and {n_k} keys; "
            f"farlight reads masks of shape (batch, heads, {n_q}, {n_k}). Pass a 2-D padding mask to the model, or "
            "one of that shape."
        )
    if mask.dtype != torch.bool:
        allowed = mask == 0
        # Half of the smallest number: sums of several "minus infinities" are at least that low.
        fine = (allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()
        if torch.compiler.is_compiling():
            torch._assert_async(fine, _BIAS)
        elif not bool(fine):
            raise UnsupportedError(_BIAS)
        mask = allowed
    # A key that no query sees is padding, and so is a query that sees nothing.
    key_real, query_real = mask.any(2).any(1), mask.any(3).any(1)
    if batch is not None:
        key_real, query_real = key_real.expand(batch, -1), query_real.expand(batch, -1)
    return ModelMask(pairs(mask), n_k - n_q, key_real=key_real, query_real=query_real)


@dataclass(frozen=True)
class _Rule:
    """-left <= j - i <= right (None = no limit), and i, j in one group where groups are given."""

    left: int | None = None
    right: int | None = None
    groups: Tensor | tuple[int, Tensor] | None = None  # ids of packed sequences, or (chunk length, left padding)

    def pattern(self, n: int, dropped: int) -> Pattern:
        if self.left is None and self.right is None:
            near: Pattern = full()
        elif self.left is None and self.right == 0:
            near = causal()
        elif self.left == -1 and self.right == 0:  # no key at all: Qwen2-MoE asks for it beside the masks that it uses
            near = ~full()
        elif self.left == -1:
            near = ~causal() if self.right is None else window(0, self.right) - causal()
        else:
            # A side without limit reaches the end of any text.
            near = window(*(2**40 if side is None else side for side in (self.left, self.right)))
        if self.groups is None:
            return near
        if isinstance(self.groups, Tensor):
            ids = self.groups[..., :n]
        else:
            length, left = self.groups
            ids = (torch.arange(n, device=left.device) + dropped - left.reshape(-1, 1)) // length
            ids = ids - ids.min() if ids.numel() else ids
        same = documents(ids)
        return same if near.text == full().text else near & same


def _recognise(function: Callable[..., Any]) -> _Rule | None:
    """What a mask function of transformers means, or None when it is not one of those known here."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return _Rule(right=0)
    if function is masking_utils.bidirectional_mask_function:
        return _Rule()
    if getattr(function, "__module__", "") != masking_utils.__name__:
        return None
    match getattr(function, "__qualname__", "").split(".<locals>.")[0], _held(function):
        case "sliding_window_overlay", {"sliding_window": int(width)} if width >= 0:
            return _Rule(left=width - 1)
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(width)} if width >= 0:
            return _Rule(left=width, right=width)
        case "chunked_overlay", {"chunk_size": int(length), "left_padding": Tensor() as left}:
            return _Rule(groups=(length, left))
        case "packed_sequence_mask_function", {"packed_sequence_mask": Tensor() as ids}:
            return _Rule(groups=ids)
        case "and_masks", {"mask_functions": (*functions,)}:
            return _all_of(functions)
    return None


def _all_of(functions: list[Callable[..., Any]]) -> _Rule | None:
    """The rule that holds where all of these hold."""
    from transformers import masking_utils

    packed = any(_is_from(f, masking_utils.packed_sequence_mask_function) for f in functions)
    rule: _Rule | None = _Rule()
    for function in functions:
        remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # not in older releases
        if packed and remap is not None and _is_from(function, remap):
            # Positions count up by one within a packed sequence, so inside it distances are the same before and after
            # the renumbering; across sequences nothing is allowed anyway.
            function = _held(function)["mask_function"]
        part = _recognise(function)
        if part is None or rule is None or (part.groups is not None and rule.groups is not None):
            return None
        rule = _Rule(
            _least(rule.left, part.left),
            _least(rule.right, part.right),
            part.groups if rule.groups is None else rule.groups,
        )
    return rule


def _is_from(function: Callable[..., Any], maker: Callable[..., Any]) -> bool:
    """Whether `function` is what `maker` returns."""
    return getattr(function, "__qualname__", "").startswith(f"{maker.__qualname__}.<locals>.")


def _held(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a closure holds."""
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _least(a: int | None, b: int | None) -> int | None:
    limits = [side for side in (a, b) if side is not None]
    return min(limits) if limits else None


def _evaluate(
    batch: int, n_q: int, n_k: int, q_offset: int, kv_offset: int, function: Callable[..., Any], kwargs: dict[str, Any]
) -> Pattern:
    """The mask function evaluated on every pair, as transformers' own SDPA path does."""
    from transformers.masking_utils import sdpa_mask

    if batch * n_q * n_k > _EVALUATED:
        name = getattr(function, "__qualname__", repr(function))
        raise UnsupportedError(
            f"this model masks attention by a function farlight does not know ({name!r}); evaluating it for {batch} x "
            f"{n_q} x {n_k} pairs would need {batch * n_q * n_k / 2**30:.1f} GiB. Use a shorter text, or "
            "attn_implementation='sdpa'."
        )
    mask = sdpa_mask(
        batch_size=batch,
        q_length=n_q,
        kv_length=n_k,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=None,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=bool(kwargs.get("use_vmap", False)),
        device=kwargs.get("device", "cpu"),
    )
    if mask is None or (n_q == n_k and q_offset != kv_offset):
        # `pairs` reads a square table by position, and here row 0 is not position 0.
        raise UnsupportedError(
            f"this model masks attention by a function farlight does not know, for {n_q} queries from position "
            f"{q_offset} and {n_k} keys from position {kv_offset}. Use attn_implementation='sdpa' for this call."
        )
    return pairs(mask)
