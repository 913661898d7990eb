"""Visibility programs: what a query sees, as instructions that the native kernels evaluate on the positions of all slots.

`compile_program` translates a pattern whose pairs depend on the positions alone (windows, strides, named tokens, algebra); the
opcodes and their arguments are `VisibilityOp` in csrc/decode.h. Patterns with tables have no program, and are evaluated by
their own definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from farlight.patterns import causal, full, global_tokens, offsets, seen_by_all, sees_all, strided, window
from farlight.patterns.algebra import Complement, Difference, Intersection, Union
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.positional import blocked_window, landmarks

__all__ = ["Program", "compile_program"]

_CONSTANT, _BETWEEN, _DIVIDES, _KEY_MODULO, _QUERY_MODULO, _KEY_RUNS, _QUERY_RUNS, _DISTANCE_RUNS, _BLOCKS = range(9)
_AND, _OR, _AND_NOT, _NOT = range(9, 13)
# Positions and distances that the kernels divide in double, or add to without overflow.
_LARGEST = 2**42


@dataclass(frozen=True)
class Program:
    """code: instructions; depth: a bound of the number of byte arrays on their stack."""

    code: tuple[int, ...]
    depth: int


def compile_program(pattern: Pattern, sizes: Sizes) -> Program | None:
    """The program of a pattern for texts of these sizes; None where a part of it has no instruction.

    >>> import farlight as fl
    >>> compile_program(fl.causal() & fl.window(4), Sizes.of(100))
    Program(code=(1, -4398046511104, 0, 1, -4, 4, 9), depth=3)
    """
    if isinstance(pattern, Union | Intersection | Difference | Complement):
        parts = [compile_program(part, sizes) for part in pattern.parts]
        return _joined(type(pattern), parts)
    rule = _INSTRUCTIONS.get(type(pattern))
    code = None if rule is None else rule(pattern, sizes)
    if code is None or any(abs(number) > _LARGEST for number in code):
        return None
    return Program(tuple(code), 2)


def _joined(operation: type[Pattern], parts: Sequence[Program | None]) -> Program | None:
    """The programs of the parts one after the other, each but the first followed by the operation."""
    code: list[int] = []
    depth = 0
    for number, part in enumerate(parts):
        if part is None:
            return None
        code += part.code
        depth = max(depth, part.depth + (1 if number else 0))
        if number:
            code.append(_AND if operation is Intersection else _AND_NOT if operation is Difference else _OR)
    if operation is Complement:
        code.append(_NOT)
    return Program(tuple(code), depth)


def _window(pattern: Any, sizes: Sizes) -> list[int]:
    code = [_BETWEEN, -pattern.left * pattern.dilation, pattern.right * pattern.dilation]
    return code if pattern.dilation == 1 else [*code, _DIVIDES, pattern.dilation, _AND]


def _strided(pattern: Any, sizes: Sizes) -> list[int] | None:
    stride, phase = pattern.stride, pattern.phase
    if phase is None:
        return [_DIVIDES, stride]
    if pattern.varies_over_heads:
        return None
    phase = 0 if phase == "head" else phase
    return [_QUERY_MODULO, stride, phase, phase + 1, _KEY_MODULO, stride, phase, phase + 1, _AND]


def _offsets(pattern: Any, sizes: Sizes) -> list[int]:
    runs = pattern._distance_runs().T.reshape(-1).tolist()
    return [_DISTANCE_RUNS, len(runs) // 2, *runs] if runs else [_CONSTANT, 0]


def _named_runs(pattern: Any, sizes: Sizes) -> list[int] | None:
    """The intervals of the named positions; None where they are given as a mask."""
    if pattern.positions is None:
        return None
    runs = pattern._edges(sizes, torch.device("cpu")).numpy()
    return [int(edge) for edge in np.minimum(runs, _LARGEST)]


def _named(*ops: int) -> Callable[[Any, Sizes], list[int] | None]:
    def instructions(pattern: Any, sizes: Sizes) -> list[int] | None:
        runs = _named_runs(pattern, sizes)
        if runs is None:
            return None
        return [word for op in ops for word in (op, len(runs) // 2, *runs)] + [_OR] * (len(ops) - 1)

    return instructions


def _blocked_window(pattern: Any, sizes: Sizes) -> list[int]:
    return [_BLOCKS, pattern.block, -pattern.left, pattern.right]


def _landmarks(pattern: Any, sizes: Sizes) -> list[int]:
    return [_KEY_MODULO, pattern.every, pattern.every - pattern.last, pattern.every]


_INSTRUCTIONS: dict[type[Pattern], Callable[[Any, Sizes], list[int] | None]] = {
    full: lambda pattern, sizes: [_CONSTANT, 1],
    causal: lambda pattern, sizes: [_BETWEEN, -_LARGEST, 0],
    window: _window,
    strided: _strided,
    offsets: _offsets,
    blocked_window: _blocked_window,
    landmarks: _landmarks,
    seen_by_all: _named(_KEY_RUNS),
    sees_all: _named(_QUERY_RUNS),
    global_tokens: _named(_KEY_RUNS, _QUERY_RUNS),
}
