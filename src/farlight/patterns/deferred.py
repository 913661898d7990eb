"""`DeferredPattern`: a pattern made from a tensor whose values cannot be read yet (traced by torch.compile, fake, or on meta).

`padding(lengths)` with a tensor reads the lengths immediately and keeps them as Python integers. Where it cannot, the tensor
becomes the table of a `DeferredPattern` whose text is that of the intended constructor. The attention operator receives the
text and the table with its values, parses the text, and the constructor reads them then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, read_table
from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.registry import constructors

__all__ = ["DeferredPattern", "has_no_items", "is_unreadable", "restore_list"]

# Dimensions of the integer tensor that each constructor takes.
_DIMS = {"padding": 1, "documents": 2, "global_tokens": 1, "sees_all": 1, "seen_by_all": 1}
# Constructors whose integers are lengths, which may differ between batch items; the others take positions.
_LENGTHS = ("padding", "documents")
# Arguments of the notation that are lists of integers, as "constructor" (first argument) or "constructor: argument".
_LIST_ARGUMENTS = ("padding", "documents: lengths", "global_tokens", "sees_all", "seen_by_all")


def is_unreadable(value: Any) -> bool:
    """Whether `value` is an integer tensor (a mask is none) whose values cannot be read now."""
    return (
        isinstance(value, Tensor)
        and value.dtype != torch.bool
        and (torch.compiler.is_compiling() or value.is_meta or isinstance(value, FakeTensor))
    )


def has_no_items(value: Any) -> bool:
    """Whether `value` is an integer tensor of shape `(0,)`: the lengths of an empty batch."""
    return isinstance(value, Tensor) and value.shape == (0,) and not value.is_floating_point() and value.dtype != torch.bool


def restore_list(argument: str, value: Any) -> Any:
    """`value.tolist()` where the argument is a list of integers that travelled as a table, and can be read; else `value`."""
    is_list = (
        argument in _LIST_ARGUMENTS and isinstance(value, Tensor) and value.dtype != torch.bool and not is_unreadable(value)
    )
    return value.tolist() if is_list else value


class DeferredPattern(Atom):
    """`padding`, `documents(lengths=…)` or named tokens, made from an integer tensor that cannot be read yet."""

    name: str

    def __init__(self, name: str, values: Tensor) -> None:
        what = f"{name}: {'lengths' if name in _LENGTHS else 'positions'}"
        table = read_table(what, values.reshape(1) if values.dim() == 0 else values, _DIMS[name], dtype=torch.int64)
        per_item = name in _LENGTHS and values.dim() == _DIMS[name] and table.shape[0] > 1
        text = f"{name}(lengths=$0)" if name == "documents" else f"{name}($0)"
        self._set(name=name, text=text, tables=(table,), varies_over_batch=per_item)

    def _batch_and_heads(self) -> tuple[int, int]:
        return (self._tables[0].shape[0] if self.varies_over_batch else 1), 1

    def check(self, sizes: Sizes) -> None:
        if self.name in _LENGTHS:
            check_leading(f"{self.name}: lengths", self._tables[0], sizes, heads=False)

    def _rewrite(self) -> Pattern:
        """The intended pattern: plans are made where the values can be read."""
        if is_unreadable(self._tables[0]):
            raise PatternError(
                f"{self.name} was made from a tensor without numbers (traced, or on meta), so it cannot be planned."
            )
        values, construct = self._tables[0].tolist(), constructors()[self.name]
        return construct(lengths=values) if self.name == "documents" else construct(values)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        values = self._tables[0].to(j.device)
        item = b if self.varies_over_batch else torch.zeros_like(b)
        if self.name == "padding":
            return j < values[item]
        if self.name == "documents":
            # Document number of a position = number of documents that end at or before it; past the last: none.
            ends = values.cumsum(1)[item]
            i_document, j_document = ((ends <= position[..., None]).sum(-1) for position in (i, j))
            return (i_document == j_document) & (i >= 0) & (j_document < ends.shape[-1])
        named = torch.where(values < 0, values + sizes.n_k, values)
        i_named, j_named = (((position[..., None] == named) & (named >= 0)).any(-1) for position in (i, j))
        return {"sees_all": i_named, "seen_by_all": j_named}.get(self.name, i_named | j_named)
