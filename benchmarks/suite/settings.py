"""How large the measured problems are, and how long a section may take."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from farlight.patterns import global_tokens, window
from farlight.patterns.expression import Pattern

__all__ = ["FULL", "QUICK", "TINY", "Box", "Settings", "name_of"]


@dataclass(frozen=True)
class Settings:
    """The sizes of one run. `pattern` is JSON, None for window 256 + 64 global; everything is plain data."""

    name: str = "full"
    tokens: int = 16_384
    heads: int = 12
    head_dim: int = 64
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    repeats: int = 5
    pattern: str | None = None
    flex: bool = True
    memory: bool = True  # also measure peak memory, each time in a process of its own
    lengths: tuple[int, ...] = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
    longest_backward: int = 262_144
    longest_dense: int = 16_384
    dims: tuple[int, ...] = (32, 64, 80, 128, 256)
    model_lengths: tuple[int, ...] = (4096, 16_384)
    thread_tokens: int = 65_536
    long_tokens: tuple[int, int] = (65_536, 1_048_576)
    call_loops: int = 200
    decode_heads: int = 8
    short_lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    plan_exponents: tuple[int, int] = (14, 20)
    matmul_size: int = 2048

    @property
    def rehearsal(self) -> bool:
        """On a GPU's sections: toy sizes under Triton's interpreter, which prove the program and not the kernels' speed."""
        return self.name == "tiny"

    def types(self) -> tuple[torch.dtype, ...]:
        return tuple(getattr(torch, name) for name in self.dtypes)

    def chosen(self) -> Pattern:
        """The pattern that the tables of time are about."""
        if self.pattern is not None:
            return Pattern.from_json(self.pattern)
        return window(256) | global_tokens(range(min(64, self.tokens)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Settings:
        read: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return Settings(**read)


FULL = Settings()

QUICK = Settings(
    name="quick",
    tokens=4096,
    repeats=3,
    lengths=(1024, 4096, 16_384),
    longest_backward=16_384,
    longest_dense=4096,
    dims=(32, 64, 128),
    model_lengths=(2048,),
    thread_tokens=16_384,
    long_tokens=(16_384, 65_536),
    short_lengths=(256, 512, 1024, 2048),
    plan_exponents=(14, 16),
)

# Shows that the code runs, and nothing else: its figures mean nothing.
TINY = Settings(
    name="tiny",
    tokens=256,
    heads=2,
    head_dim=16,
    dtypes=("float32",),
    repeats=1,
    flex=False,
    memory=False,
    lengths=(128, 512),
    longest_backward=128,
    longest_dense=128,
    dims=(16, 24),
    model_lengths=(256,),
    thread_tokens=256,
    long_tokens=(128, 512),
    call_loops=2,
    decode_heads=2,
    short_lengths=(128, 256),
    plan_exponents=(8, 9),
    matmul_size=64,
)


class Box:
    """The time that a section may take. What no longer fits is reported as skipped, never left out in silence."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self._end - time.perf_counter()

    def refusal(self, expected: float = 0.0) -> str | None:
        """Why a measurement that takes about `expected` seconds is not begun; None when there is time."""
        if self.left >= expected and self.left > 0:
            return None
        return f"takes about {expected:.0f} s, and less is left of the section's {self.seconds:g} s"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
