"""Recognition of transformers' mask functions, and the evaluation of the others.

transformers describes a mask by a Python function (batch, head, q_index, kv_index) -> bool. The functions that transformers
itself composes are recognised by their qualified name and the variables in their closure, and become a `MaskRule`: limits on
the distance j - i and groups within which tokens attend. A rule becomes a pattern without any pair being visited. Every other
function is evaluated on every pair, as transformers' own SDPA path does: exact and quadratic, up to 2^28 pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.errors import UnsupportedError
from farlight.patterns import causal, documents, full, pairs, window
from farlight.patterns.expression import Pattern

__all__ = ["MaskFunction", "MaskRule", "evaluate_mask_function", "recognise"]

MaskFunction = Callable[..., Any]

# Pairs up to which an unknown mask function is evaluated: 16 384 tokens, 256 MiB of bool.
_MAX_EVALUATED_PAIRS = 1 << 28
# Stands for a side of a window without a limit: longer than any text.
_UNLIMITED = 1 << 40


@dataclass(frozen=True)
class MaskRule:
    """The pairs with -left <= j - i <= right (None = no limit), i and j in one group where groups are given.

    `groups`: ids `(B, n)` of packed sequences, or (chunk length, left padding `(B,)`).
    """

    left: int | None = None
    right: int | None = None
    groups: Tensor | tuple[int, Tensor] | None = None

    def pattern(self, n_k: int, num_dropped: int) -> Pattern:
        """The rule over `n_k` keys, the first of which stands at position `num_dropped` of the text."""
        distances = self._distances()
        if self.groups is None:
            return distances
        if isinstance(self.groups, Tensor):
            ids = self.groups[..., :n_k]
        else:
            length, left_padding = self.groups
            ids = (torch.arange(n_k, device=left_padding.device) + num_dropped - left_padding.reshape(-1, 1)) // length
            ids = ids - ids.min() if ids.numel() else ids
        same_group = documents(ids)
        return same_group if distances.text == full().text else distances & same_group

    def _distances(self) -> Pattern:
        """The limits on j - i as a pattern."""
        if self.left is None and self.right is None:
            return full()
        if self.left is None and self.right == 0:
            return causal()
        if self.left == -1 and self.right == 0:  # the empty mask, which Qwen2-MoE makes beside the masks it uses
            return ~full()
        if self.left == -1:
            return ~causal() if self.right is None else window(0, self.right) - causal()
        return window(*(_UNLIMITED if limit is None else limit for limit in (self.left, self.right)))


def recognise(function: MaskFunction) -> MaskRule | None:
    """The rule of a mask function of transformers; None when the function is not one of those known here."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return MaskRule(right=0)
    if function is masking_utils.bidirectional_mask_function:
        return MaskRule()
    if getattr(function, "__module__", "") != masking_utils.__name__:
        return None
    match getattr(function, "__qualname__", "").split(".<locals>.")[0], _closure(function):
        case "sliding_window_overlay", {"sliding_window": int(width)} if width >= 0:
            return MaskRule(left=width - 1)
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(width)} if width >= 0:
            return MaskRule(left=width, right=width)
        case "chunked_overlay", {"chunk_size": int(length), "left_padding": Tensor() as left_padding}:
            return MaskRule(groups=(length, left_padding))
        case "packed_sequence_mask_function", {"packed_sequence_mask": Tensor() as ids}:
            return MaskRule(groups=ids)
        case "and_masks", {"mask_functions": (*functions,)}:
            return _intersection(functions)
    return None


def _intersection(functions: list[MaskFunction]) -> MaskRule | None:
    """The rule of `and_masks(*functions)`; None where one of them is unknown or two have groups."""
    from transformers import masking_utils

    packed = any(_is_made_by(f, masking_utils.packed_sequence_mask_function) for f in functions)
    rule = MaskRule()
    for function in functions:
        remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # missing in older releases
        if packed and remap is not None and _is_made_by(function, remap):
            # Positions count up by one within a packed sequence, so renumbering keeps the distances inside it; across
            # sequences no pair is allowed anyway.
            function = _closure(function)["mask_function"]
        part = recognise(function)
        if part is None or (part.groups is not None and rule.groups is not None):
            return None
        rule = MaskRule(
            _tighter(rule.left, part.left),
            _tighter(rule.right, part.right),
            part.groups if rule.groups is None else rule.groups,
        )
    return rule


def _is_made_by(function: MaskFunction, factory: Callable[..., Any]) -> bool:
    """Whether `function` is a closure returned by `factory`."""
    return getattr(function, "__qualname__", "").startswith(f"{factory.__qualname__}.<locals>.")


def _closure(function: MaskFunction) -> dict[str, Any]:
    """The captured variables of a closure, by name."""
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _tighter(a: int | None, b: int | None) -> int | None:
    """The smaller of two limits; None is no limit."""
    limits = [limit for limit in (a, b) if limit is not None]
    return min(limits) if limits else None


def evaluate_mask_function(
    batch: int, n_q: int, n_k: int, q_offset: int, kv_offset: int, function: MaskFunction, kwargs: dict[str, Any]
) -> Pattern:
    """`pairs(mask)` of the function evaluated on every pair. Raises UnsupportedError above 2^28 pairs."""
    from transformers.masking_utils import sdpa_mask

    if batch * n_q * n_k > _MAX_EVALUATED_PAIRS:
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
        # `pairs` reads a square table by position, and row 0 is not position 0 here.
        raise UnsupportedError(
            f"this model masks attention by a function farlight does not know, for {n_q} queries from position "
            f"{q_offset} and {n_k} keys from position {kv_offset}. Use attn_implementation='sdpa' for this call."
        )
    return pairs(mask)
