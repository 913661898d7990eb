"""The model's own mask: as a pattern (`ModelMask`), and as a tensor that is not materialised (`LazyMask`).

transformers passes masks through a model as tensors: `generate` with a static cache reads their dimensions, models read
their dtype and shape, DeepSeek's indexers read their entries. A `LazyMask` has the shape, dtype and device of the dense bool
mask and carries a `ModelMask`. `mask[:, 0]` materialises the single head, as a bool mask that adds to scores like the additive
mask of its meaning (`_HeadMask`). All other arithmetic is refused: a model made for additive masks (0 = allowed) would compute
the opposite with a bool mask (True = allowed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.errors import UnsupportedError
from farlight.patterns.expression import Pattern

__all__ = ["LazyMask", "ModelMask"]


@dataclass(frozen=True)
class ModelMask:
    """The model's own mask of one forward pass: a pattern, and the position of the queries among the keys.

    Args:
        pattern: the allowed pairs. Keys are counted from 0, also where a sliding cache has dropped the first `num_dropped`.
        q_offset: position of the first query in that count.
        num_dropped: keys at the front that a sliding cache no longer holds.
        n_k: number of keys the pattern covers; None means all. The slots after the last query (empty slots of a static
            cache) are visible to no query and left out.
        key_real: `(B, n_k)` bool, False where a key is padding; None where none is. A router must not choose padding.
        query_real: `(B, n_q)` bool, False where a query is padding; None where none is, or as `key_real` says.
        text_real: `(B, n_k)` bool: `key_real` with the dropped keys counted as the tokens they were; None = `key_real`.
        with_dropped_keys: makes the same mask with the dropped keys counted in and visible to no query; None where no key
            was dropped.
    """

    pattern: Pattern
    q_offset: int
    num_dropped: int = 0
    n_k: int | None = None
    key_real: Tensor | None = None
    query_real: Tensor | None = None
    text_real: Tensor | None = None
    with_dropped_keys: Callable[[], ModelMask] | None = None

    def to(self, dtype: torch.dtype) -> ModelMask:
        """Itself, for models that convert their mask to bool, which inside a graph is no tensor. Raises for other types."""
        if dtype != torch.bool:
            raise UnsupportedError(f"this model converts its attention mask to {dtype}; farlight keeps it as a set of pairs.")
        return self

    def dense(self, batch: int, n_q: int, n_k: int, device: torch.device) -> Tensor:
        """`(batch, 1, n_q, n_k)` bool; keys beyond `self.n_k` are False."""
        num_covered = n_k if self.n_k is None else self.n_k
        mask = self.pattern.dense(n_q, num_covered, batch=batch, q_offset=self.q_offset, device=device)
        return torch.nn.functional.pad(mask.expand(batch, 1, -1, -1), (0, n_k - num_covered))


class LazyMask(Tensor):
    """`model_mask` as a bool tensor `(batch, 1, n_q, n_k)` without storage."""

    model_mask: ModelMask

    @staticmethod
    def __new__(cls, model_mask: ModelMask, batch: int, n_q: int, n_k: int, device: torch.device | str) -> LazyMask:
        shape = (batch, 1, n_q, n_k)
        mask: LazyMask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        mask.model_mask = model_mask
        return mask

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"LazyMask({self.model_mask.pattern!r}, shape={tuple(self.shape)})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        aten, keywords = torch.ops.aten, kwargs or {}
        mask = args[0] if args else None
        if isinstance(mask, LazyMask):
            batch, _, n_q, n_k = mask.shape
            device_copy = func is aten._to_copy.default and keywords.get("dtype") in (None, torch.bool)
            identity = func in (aten.detach.default, aten.alias.default, aten.clone.default)
            if device_copy or identity or (func is aten.slice.Tensor and _is_full_slice(mask, *args[1:])):
                return cls(mask.model_mask, batch, n_q, n_k, keywords.get("device") or mask.device)
            if func is aten.select.int and args[1:] == (1, 0):
                return mask.model_mask.dense(batch, n_q, n_k, mask.device)[:, 0].as_subclass(_HeadMask)
        raise UnsupportedError(
            f"this model computes with its own attention mask ({func}), which attn_implementation='farlight' does not write "
            "out, because it cannot know whether a bool or an additive mask is meant. Use 'eager' or 'sdpa' for this model."
        )


class _HeadMask(Tensor):
    """A bool mask, True = allowed, that DeepSeek's indexers may also add to their scores (transformers up to 5.21 does)."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__) and len(args) == 2 and not kwargs:
                mask, scores = args if isinstance(args[0], cls) else args[::-1]
                return scores.masked_fill(~mask.as_subclass(Tensor), -torch.inf)
            out = func(*args, **(kwargs or {}))
            keeps_values = func in (Tensor.__getitem__, Tensor.to, Tensor.expand) and out.dtype == torch.bool
            return out.as_subclass(cls) if keeps_values else out


def _is_full_slice(mask: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    """Whether `mask[start:end:step]` along `dim` is the whole dimension."""
    return not start and (end is None or end >= mask.shape[dim]) and step == 1
