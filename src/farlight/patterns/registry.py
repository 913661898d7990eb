"""The registry of pattern constructors: the names that may be called in the notation and in JSON.

`farlight.patterns` registers every primitive, `per_head` and the presets when it is imported. The parser only reads the
registry, so it imports no primitive. A new primitive needs one entry in `farlight/patterns/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from farlight.patterns.expression import Pattern

__all__ = ["constructors", "register"]

_CONSTRUCTORS: dict[str, Callable[..., Pattern]] = {}


def register(constructor: Callable[..., Pattern], *names: str) -> None:
    """Make `constructor` callable in the notation under `names`, by default under its own name.

    Raises ValueError where another constructor has the name already.
    """
    for name in names or (constructor.__name__,):
        if _CONSTRUCTORS.setdefault(name, constructor) is not constructor:
            raise ValueError(f"the pattern notation has another constructor of the name {name!r}.")


def constructors() -> Mapping[str, Callable[..., Pattern]]:
    """Every registered name with its constructor: a read-only view, in the order of registration."""
    return MappingProxyType(_CONSTRUCTORS)
