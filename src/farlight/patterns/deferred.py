"""Patterns made from numbers in a tensor that cannot be read: in a program that is being traced, or on the meta device.

`padding(lengths)` with a tensor of lengths reads them at once. Where it cannot, the tensor becomes the table of an `Unread`
atom, whose text is that of the pattern it stands for: the operator, which is given numbers, parses the text and reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from farlight.errors import PatternError
from farlight.patterns.arguments import check_leading, read_table
from farlight.patterns.expression import Atom, Pattern, Sizes

__all__ = ["Unread", "hidden"]

# Dimensions of the numbers that each constructor takes; the lengths may differ between batch items.
_DIMS = {"padding": 1, "documents": 2, "global_tokens": 1, "sees_all": 1, "seen_by_all": 1}
_LENGTHS = ("padding", "documents")
# The arguments of the notation that are such numbers.
_LISTS = ("padding", "documents: lengths", "global_tokens", "sees_all", "seen_by_all")


def hidden(value: Any) -> bool:
    """Whether this is a tensor of numbers, not a mask, that cannot be read now."""
    return (
        isinstance(value, Tensor)
        and value.dtype != torch.bool
        and (torch.compiler.is_compiling() or value.is_meta or isinstance(value, FakeTensor))
    )


def empty(value: Any) -> bool:
    """Whether these are the lengths of a batch of no items."""
    return isinstance(value, Tensor) and value.shape == (0,) and not value.is_floating_point() and value.dtype != torch.bool


def listed_again(argument: str, value: Any) -> Any:
    """The value, or the numbers in it where it is a table that stands for a list and they can be read."""
    is_list = argument in _LISTS and isinstance(value, Tensor) and value.dtype != torch.bool and not hidden(value)
    return value.tolist() if is_list else value


class Unread(Atom):
    """`padding`, `documents(lengths=…)` or named tokens, made from a tensor that cannot be read yet."""

    name: str

    def __init__(self, name: str, numbers: Tensor) -> None:
        what = f"{name}: {'lengths' if name in _LENGTHS else 'positions'}"
        table = read_table(what, numbers.reshape(1) if numbers.dim() == 0 else numbers, _DIMS[name], kind="int")
        several = name in _LENGTHS and numbers.dim() == _DIMS[name] and table.shape[0] > 1
        text = f"{name}(lengths=$0)" if name == "documents" else f"{name}($0)"
        self._set(name=name, text=text, tables=(table,), varies_over_batch=several)

    def _made_for(self) -> tuple[int, int]:
        return (self._tables[0].shape[0] if self.varies_over_batch else 1), 1

    def check(self, sizes: Sizes) -> None:
        if self.name in _LENGTHS:
            check_leading(f"{self.name}: lengths", self._tables[0], sizes, heads=False)

    def _rewrite(self) -> Pattern:
        if hidden(self._tables[0]):
            raise PatternError(
                f"{self.name} was made from a tensor without numbers (traced, or on meta), so it cannot be planned."
            )
        from farlight.patterns.notation import parse

        return parse(self.text, self._tables, limit=None)

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        numbers = self._tables[0].to(j.device)
        item = b if self.varies_over_batch else torch.zeros_like(b)
        if self.name == "padding":
            return j < numbers[item]
        if self.name == "documents":
            # A position lies in the document before which as many end as at another position: none, after the last one.
            ends = numbers.cumsum(1)[item]
            document, other = ((ends <= at[..., None]).sum(-1) for at in (i, j))
            return (document == other) & (i >= 0) & (other < ends.shape[-1])
        named = torch.where(numbers < 0, numbers + sizes.n_k, numbers)
        named_i, named_j = (((at[..., None] == named) & (named >= 0)).any(-1) for at in (i, j))
        return {"sees_all": named_i, "seen_by_all": named_j}.get(self.name, named_i | named_j)
