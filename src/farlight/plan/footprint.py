"""Memory accounting: the bytes that values hold, and the dict of tables derived from a plan that charges its bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import FunctionType

from torch import Tensor

from farlight.patterns.expression import Pattern

__all__ = ["Derived", "held_bytes"]

# Overhead in bytes beside the content: of a tensor, of another object, of a list entry with its int, of a dict entry.
_TENSOR, _OBJECT, _ITEM, _FIELD = 700, 256, 40, 128


def held_bytes(*values: object) -> int:
    """Bytes held by tensors, dataclasses, containers, closures and patterns; what is shared counts once."""
    visited: set[int] = set()

    def size_of(value: object) -> int:
        if value is None or isinstance(value, (int, float)) or id(value) in visited:
            return 0
        visited.add(id(value))
        if isinstance(value, (str, bytes)):
            return len(value)
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            shared = storage.data_ptr() in visited
            visited.add(storage.data_ptr())
            return _TENSOR + (0 if shared else storage.nbytes())
        if isinstance(value, (tuple, list)):
            return _OBJECT + _ITEM * len(value) + sum(map(size_of, value))
        if isinstance(value, dict):
            return _OBJECT + sum(_FIELD + size_of(key) + size_of(item) for key, item in value.items())
        if isinstance(value, FunctionType):
            return _OBJECT + sum(size_of(cell.cell_contents) for cell in value.__closure__ or ())
        if isinstance(value, Pattern):
            return _OBJECT + size_of(value.__dict__)
        if dataclasses.is_dataclass(value):
            return _OBJECT + sum(size_of(getattr(value, field.name)) for field in dataclasses.fields(value))
        return _OBJECT + int(getattr(value, "nbytes", 0))

    return sum(map(size_of, values))


def _discard_charge(nbytes: int) -> None:
    """The `charge` of a plan that is in no cache."""


class Derived(dict[object, object]):
    """Values that backends derive from a plan's tables (transposes, lowered lists, native copies), owned by the plan.

    Setting an item calls `charge` with the change in bytes, so that the plan cache counts it. `shared`: what the plan and its
    derived values hold, but another plan counts.
    """

    charge: Callable[[int], None] = staticmethod(_discard_charge)
    shared: tuple[object, ...] = ()

    def __setitem__(self, key: object, value: object) -> None:
        before = self.get(key)
        super().__setitem__(key, value)
        self.charge(held_bytes(*self.shared, value) - held_bytes(*self.shared, before))

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        # Derived values can be recomputed, and native copies cannot be pickled: a copy starts empty.
        return Derived, ()
