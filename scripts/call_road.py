"""Print the modules of farlight whose functions run in one forward call of `window | global` on the CPU.

    python scripts/call_road.py

First a call that plans, then one that finds its plan in the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import torch

import farlight as fl


def modules_of(call: Callable[[], object]) -> list[str]:
    """The modules in which a function was entered, in order of first entry; methods that dataclass generates excluded."""
    entered: dict[str, None] = {}

    def trace(frame: FrameType, event: str, argument: object) -> None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("farlight") and frame.f_code.co_filename != "<string>":
            entered.setdefault(name)

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return list(entered)


def main() -> None:
    """Trace both calls."""
    q = torch.randn(1, 2, 1024, 32)
    fl.attention(q, q, q, fl.window(5) | fl.global_tokens([1]))  # imports and one-time set-up
    pattern = fl.window(64) | fl.global_tokens([0])
    for title in ("a call that plans", "a call that finds its plan"):
        names = modules_of(lambda: fl.attention(q, q, q, pattern))
        print(f"{title}: {len(names)} modules")
        print("\n".join(f"  {name}" for name in names))


if __name__ == "__main__":
    main()
