"""What a value holds in memory, and what is derived from a plan: counted, so that the cache can bound all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from farlight.patterns.expression import Pattern

__all__ = ["Derived", "held_bytes"]

# What a tensor and another object take beside their content, and an entry of a list or dict with its small number or key.
_TENSOR, _OBJECT, _NUMBER, _FIELD = 700, 256, 40, 128


def held_bytes(*values: object) -> int:
    """Bytes that tensors, dataclasses, containers and patterns keep in memory; what is found twice counts once."""
    seen: set[int] = set()

    def of(value: object) -> int:
        if value is None or isinstance(value, (int, float)) or id(value) in seen:
            return 0
        seen.add(id(value))
        if isinstance(value, (str, bytes)):
            return len(value)
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            shared = storage.data_ptr() in seen
            seen.add(storage.data_ptr())
            return _TENSOR + (0 if shared else storage.nbytes())
        if isinstance(value, (tuple, list)):
            return _OBJECT + _NUMBER * len(value) + sum(map(of, value))
        if isinstance(value, dict):
            return _OBJECT + sum(_FIELD + of(key) + of(one) for key, one in value.items())
        if isinstance(value, Pattern):
            return _OBJECT + of(value.__dict__)
        if dataclasses.is_dataclass(value):
            return _OBJECT + sum(of(getattr(value, field.name)) for field in dataclasses.fields(value))
        return _OBJECT + int(getattr(value, "nbytes", 0))

    return sum(map(of, values))


def _uncounted(nbytes: int) -> None:
    """A plan that no cache keeps is counted by nobody."""


class Derived(dict[object, object]):
    """What backends make of a plan's tables, once: it lives with the plan. Every addition is charged to the plan's cache."""

    charge: Callable[[int], None] = staticmethod(_uncounted)

    def __setitem__(self, key: object, value: object) -> None:
        before = self.get(key)
        super().__setitem__(key, value)
        self.charge(held_bytes(value) - held_bytes(before))

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        # It can be made again, and native copies cannot be written down.
        return Derived, ()
