"""Starts the `farlight` command without torch: help, version and completion come before the library is loaded.

Importing `farlight.cli` would run `farlight/__init__.py`, which loads torch. Here the package is entered into `sys.modules`
with its path only; its `__init__` runs when a command uses one of its names.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

__all__ = ["main"]


class _Deferred(ModuleType):
    """The package before its `__init__` has run: submodules can be imported, any other name runs it."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if name.startswith("__") or spec is None or spec.loader is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType
        spec.loader.exec_module(self)
        return getattr(self, name)


def main() -> None:
    """The entry point of the command."""
    if "farlight" not in sys.modules:
        spec = importlib.util.find_spec("farlight")
        if spec is not None:
            package = _Deferred("farlight", None)
            package.__spec__, package.__loader__, package.__file__ = spec, spec.loader, spec.origin
            package.__package__, package.__path__ = "farlight", list(spec.submodule_search_locations or ())
            sys.modules["farlight"] = package
    from farlight.cli import main as run

    run()
