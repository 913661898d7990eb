"""Union, intersection, difference, complement, and a choice by head: how patterns are combined.

Each node spells itself in the same notation that the parser reads, and answers `_allows` and `_spans` from its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from farlight.errors import OperandError, PatternError, show
from farlight.patterns.arguments import listed
from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.spans import Spans

__all__ = [
    "DEEPEST", "MOST_PARTS", "Complement", "Difference", "HeadsOf", "Intersection", "PerHead", "Union", "looks_back", "operand",
    "per_head",
]  # fmt: skip

# Every question walks the expression, so its depth is bounded well below Python's recursion limit; and the parser of Python
# does not read a chain of some thousand operators.
DEEPEST, MOST_PARTS = 200, 1024


def operand(value: object, sign: str) -> Pattern:
    if not isinstance(value, Pattern):
        what = type(value).__name__
        raise OperandError(f"`pattern {sign} {show(value)}`: {what} is not a pattern; combine patterns with patterns.")
    return value


def joined_tables(parts: Sequence[Pattern]) -> tuple[list[str], tuple[Tensor, ...]]:
    """The parts' texts with their table marks renumbered to follow one another, and all tables."""
    texts: list[str] = []
    tables: tuple[Tensor, ...] = ()
    for part in parts:
        base = len(tables)
        text = part.text
        if base and part._tables:
            text = re.sub(r"\$(\d+)", lambda mark, base=base: f"${int(mark[1]) + base}", text)  # type: ignore[misc]
        texts.append(text)
        tables = tables + part._tables
    return texts, tables


class _Node(Pattern):
    parts: tuple[Pattern, ...]
    depth: int
    varies_over_batch: bool = False
    varies_over_heads: bool = False
    sign: ClassVar[str]
    _inner: ClassVar[int]

    def __init__(self, parts: tuple[Pattern, ...], *, bounded: bool = True) -> None:
        depth = 1 + max(part.depth if isinstance(part, _Node) else 0 for part in parts)
        if bounded and depth > DEEPEST:
            raise PatternError(
                f"this pattern is nested {depth} deep, more than {DEEPEST}; write a | b | c, whose parts stand side by side, "
                "in place of a | (b | (c | …))."
            )
        if bounded and len(parts) > MOST_PARTS:
            raise PatternError(
                f"this pattern joins {len(parts)} parts by {self.sign!r}, more than {MOST_PARTS}; name many tokens or "
                "distances in one part, as in offsets([…]) or global_tokens([…])."
            )
        texts, tables = joined_tables(parts)
        spelled = []
        for place, (part, text) in enumerate(zip(parts, texts, strict=True)):
            # `-` binds to the left; | and & may be regrouped, but only the left grouping is written without brackets.
            loose = part._precedence < self._inner or (place > 0 and part._precedence == self._inner)
            spelled.append(f"({text})" if loose else text)
        self._set(parts=parts, depth=depth, text=self._spell(spelled), tables=tables)
        self._set(
            varies_over_batch=any(part.varies_over_batch for part in parts),
            varies_over_heads=any(part.varies_over_heads for part in parts),
        )

    def _spell(self, texts: list[str]) -> str:
        return f" {self.sign} ".join(texts)

    def atoms(self) -> Iterator[Atom]:
        for part in self.parts:
            yield from part.atoms()

    def check(self, sizes: Sizes) -> None:
        for part in self.parts:
            part.check(sizes)


class _Chain(_Node):
    """`a | b | c` is one node with three parts: what is built part by part does not grow deep."""

    def __init__(self, parts: tuple[Pattern, ...], *, bounded: bool = True) -> None:
        first = parts[0]
        super().__init__((*first.parts, *parts[1:]) if isinstance(first, type(self)) else parts, bounded=bounded)


class Union(_Chain):
    """A pair is allowed when any part allows it."""

    sign = "|"
    _precedence = _inner = 1

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        out = self.parts[0]._allows(sizes, b, h, i, j)
        for part in self.parts[1:]:
            out = out | part._allows(sizes, b, h, i, j)
        return out

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        out = self.parts[0]._spans(sizes, b, h, i)
        for part in self.parts[1:]:
            out = out | part._spans(sizes, b, h, i)
        return out


class Intersection(_Chain):
    """A pair is allowed when every part allows it."""

    sign = "&"
    _precedence = _inner = 2

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        out = self.parts[0]._allows(sizes, b, h, i, j)
        for part in self.parts[1:]:
            out = out & part._allows(sizes, b, h, i, j)
        return out

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        out = self.parts[0]._spans(sizes, b, h, i)
        for part in self.parts[1:]:
            out = out & part._spans(sizes, b, h, i)
        return out


class Difference(_Node):
    """A pair is allowed when the first part allows it and the second does not."""

    sign = "-"
    _precedence = _inner = 3  # as in Python, where - binds tighter than & and |

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.parts[0]._allows(sizes, b, h, i, j) & ~self.parts[1]._allows(sizes, b, h, i, j)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return self.parts[0]._spans(sizes, b, h, i) - self.parts[1]._spans(sizes, b, h, i)


class Complement(_Node):
    """A pair is allowed when the part does not allow it."""

    sign = "~"
    _precedence = _inner = 4

    def _spell(self, texts: list[str]) -> str:
        return f"~{texts[0]}"

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ~self.parts[0]._allows(sizes, b, h, i, j)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return ~self.parts[0]._spans(sizes, b, h, i)


def looks_back(pattern: Pattern) -> bool:
    """Whether `causal()` is one of the patterns whose intersection this is: no token sees a later one."""
    if isinstance(pattern, Intersection):
        return any(looks_back(part) for part in pattern.parts)
    return pattern.text == "causal()"


class PerHead(_Node):
    """Head h follows the h-th part."""

    sign = ","
    _inner = 0

    def _spell(self, texts: list[str]) -> str:
        return "per_head([" + ", ".join(texts) + "])"

    def __init__(self, parts: tuple[Pattern, ...]) -> None:
        super().__init__(parts)
        if len(set(parts)) > 1:
            self._set(varies_over_heads=True)

    def check(self, sizes: Sizes) -> None:
        if sizes.heads != len(self.parts):
            raise PatternError(
                f"per_head was given {len(self.parts)} patterns, but there are {sizes.heads} heads; give one pattern for each."
            )
        super().check(sizes)

    def _made_for(self) -> tuple[int, int]:
        return super()._made_for()[0], len(self.parts)

    def groups(self) -> list[tuple[Pattern, tuple[int, ...]]]:
        """Each distinct pattern with the heads that follow it."""
        heads: dict[Pattern, list[int]] = {}
        for head, part in enumerate(self.parts):
            heads.setdefault(part, []).append(head)
        return [(part, tuple(hs)) for part, hs in heads.items()]

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if h.dim() == 4 and h.shape == (1, len(self.parts), 1, 1):
            # All heads side by side, as `dense` asks: each part is asked about its own heads only.
            shape = torch.broadcast_shapes(b.shape, h.shape, i.shape, j.shape)
            out = torch.zeros(shape, dtype=torch.bool, device=i.device)
            for number, part in enumerate(self.parts):
                own = slice(number, number + 1)
                out[:, own] = part._allows(sizes, b, h[:, own], i, j)
            return out
        out = torch.zeros((), dtype=torch.bool, device=i.device)
        for part, heads in self.groups():
            out = out | (HeadsOf(heads)._allows(sizes, b, h, i, j) & part._allows(sizes, b, h, i, j))
        return out

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        out = Spans.nothing(i.numel(), sizes.n_k, i.device)
        for part, heads in self.groups():
            out = out | (HeadsOf(heads)._spans(sizes, b, h, i) & part._spans(sizes, b, h, i))
        return out


class HeadsOf(Atom):
    """Everything, in these heads only. How the planner sees `per_head`; not part of the public notation."""

    heads: tuple[int, ...]
    varies_over_heads = True

    def __init__(self, heads: tuple[int, ...]) -> None:
        self._set(heads=heads, text=f"_heads({list(heads)})", tables=())

    def _variation(self, sizes: Sizes) -> Tensor:
        member = torch.zeros(1, sizes.heads, dtype=torch.int64, device="cpu")
        member[0, list(self.heads)] = 1
        return member

    def _member(self, h: Tensor) -> Tensor:
        return torch.isin(h, torch.tensor(self.heads, device=h.device))

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._member(h)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return Spans.thin(sizes.n_k, torch.zeros_like(i), self._member(h) * sizes.n_k)

    def _rows_agree(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return torch.ones_like(first, dtype=torch.bool)


def per_head(patterns: Sequence[Pattern]) -> Pattern:
    """Head h follows `patterns[h]`: a pair is allowed in head h when the h-th pattern allows it.

    Raises PatternError for an empty list or, when used, for another number of heads.

    >>> import farlight as fl
    >>> fl.per_head([fl.window(0), fl.full()]).dense(2, heads=2).int().tolist()
    [[[[1, 0], [0, 1]], [[1, 1], [1, 1]]]]
    """
    patterns = () if isinstance(patterns, Pattern) else listed("per_head", patterns, "patterns, one for each head")
    if not patterns:
        raise PatternError("per_head needs a list with one pattern for each head; it was given none.")
    return PerHead(tuple(operand(p, ",") for p in patterns))
