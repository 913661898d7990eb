"""A mask that travels through a model as a tensor, and is written out only where a model reads it.

transformers hands masks on as tensors: `generate` with a static cache asks for their dimensions, models ask for type and
shape, DeepSeek's indexers read them. A `LazyMask` has the shape, type and device of the dense bool mask, and holds what it
stands for. A model may take its only head, `mask[:, 0]`, which writes it out; other arithmetic is refused, since a model
that was made for additive masks would compute something else with a bool one.
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
    """The model's own mask for one forward pass: a pattern, and where the queries stand among the keys.

    `pattern` counts keys from 0 even when a sliding cache has dropped the first `dropped` of them; `whole()` is the same
    mask with those counted in, and seen by nobody. It speaks of the first `n_k` keys (None = all): those after the last
    query, empty slots of a static cache, are seen by nobody and left away. `key_real` `(B, n_k)` and `query_real`
    `(B, n_q)` are False for padding, None where nothing is padded; a pattern that reads content must not choose from what
    is not there. `text` `(B, n_k)` is the same with dropped keys counted as the tokens they were (None = `key_real`).
    """

    pattern: Pattern
    q_offset: int
    dropped: int = 0
    n_k: int | None = None
    key_real: Tensor | None = None
    query_real: Tensor | None = None
    text: Tensor | None = None
    whole: Callable[[], ModelMask] | None = None

    def dense(self, batch: int, n_q: int, n_k: int, device: torch.device) -> Tensor:
        """`(batch, 1, n_q, n_k)` bool."""
        seen = n_k if self.n_k is None else self.n_k
        mask = self.pattern.dense(n_q, seen, batch=batch, q_offset=self.q_offset, device=device)
        return torch.nn.functional.pad(mask.expand(batch, 1, -1, -1), (0, n_k - seen))


class LazyMask(Tensor):
    """`own` as a bool tensor `(batch, 1, n_q, n_k)` that has not been written out."""

    own: ModelMask

    @staticmethod
    def __new__(cls, own: ModelMask, batch: int, n_q: int, n_k: int, device: torch.device | str) -> LazyMask:
        shape = (batch, 1, n_q, n_k)
        mask: LazyMask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        mask.own = own
        return mask

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"LazyMask({self.own.pattern!r}, shape={tuple(self.shape)})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        aten, given = torch.ops.aten, kwargs or {}
        mask = args[0] if args else None
        if isinstance(mask, LazyMask):
            batch, _, n_q, n_k = mask.shape
            moved = func is aten._to_copy.default and given.get("dtype") in (None, torch.bool)
            same = func in (aten.detach.default, aten.alias.default, aten.clone.default)
            if moved or same or (func is aten.slice.Tensor and _everything(mask, *args[1:])):
                return cls(mask.own, batch, n_q, n_k, given.get("device") or mask.device)
            if func is aten.select.int and args[1:] == (1, 0):
                return mask.own.dense(batch, n_q, n_k, mask.device)[:, 0]
        raise UnsupportedError(
            f"this model computes with its own attention mask ({func}), which attn_implementation='farlight' does not write "
            "out, because it cannot know whether a bool or an additive mask is meant. Use 'eager' or 'sdpa' for this model."
        )


def _everything(mask: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    """Whether a slice takes all of a dimension."""
    return not start and (end is None or end >= mask.shape[dim]) and step == 1
