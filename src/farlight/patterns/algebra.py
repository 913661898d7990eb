"""Inner nodes of a pattern expression: union, intersection, difference, complement, and `per_head`.

A node computes `_allows` and `_spans` from its parts, by boolean operations and by interval arithmetic. Its text is canonical:
brackets only where precedence needs them, in the notation that the parser reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from farlight.errors import OperandError, PatternError, show
from farlight.patterns.arguments import read_list
from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.spans import Spans

__all__ = [
    "DEEPEST", "MOST_PARTS", "Complement", "Difference", "HeadsOf", "Intersection", "PerHead", "Union", "joined", "looks_back",
    "operand", "per_head",
]  # fmt: skip

# All methods recurse over the expression: depth stays well below Python's recursion limit. Python's own parser, which reads
# the canonical text, fails on chains of some thousand operators.
DEEPEST, MOST_PARTS = 200, 1024


def operand(value: object, sign: str) -> Pattern:
    """`value` as the operand of `sign`. Raises OperandError where it is not a pattern."""
    if not isinstance(value, Pattern):
        what = type(value).__name__
        raise OperandError(f"`pattern {sign} {show(value)}`: {what} is not a pattern; combine patterns with patterns.")
    return value


def joined_tables(parts: Sequence[Pattern]) -> tuple[list[str], tuple[Tensor, ...]]:
    """The texts of the parts with `$n` renumbered into one list of tables, and that list."""
    texts: list[str] = []
    tables: tuple[Tensor, ...] = ()
    for part in parts:
        first = len(tables)
        text = part.text
        if first and part._tables:
            text = re.sub(r"\$(\d+)", lambda mark, first=first: f"${int(mark[1]) + first}", text)  # type: ignore[misc]
        texts.append(text)
        tables = tables + part._tables
    return texts, tables


class _Operation(Pattern):
    """An inner node. `sign` is its operator; operands of a lower precedence than `_operand_precedence` need brackets."""

    parts: tuple[Pattern, ...]
    depth: int
    varies_over_batch: bool = False
    varies_over_heads: bool = False
    sign: ClassVar[str]
    _operand_precedence: ClassVar[int]

    def __init__(self, parts: tuple[Pattern, ...], *, bounded: bool = True) -> None:
        depth = 1 + max(part.depth if isinstance(part, _Operation) else 0 for part in parts)
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
            # All operators associate to the left: an equal operator needs brackets on the right side only.
            equal = part._precedence == self._operand_precedence
            brackets = part._precedence < self._operand_precedence or (place > 0 and equal)
            spelled.append(f"({text})" if brackets else text)
        self._set(parts=parts, depth=depth, text=self._spell(spelled), tables=tables)
        self._set(
            varies_over_batch=any(part.varies_over_batch for part in parts),
            varies_over_heads=any(part.varies_over_heads for part in parts),
        )

    def _spell(self, texts: list[str]) -> str:
        """The canonical text of this node from the texts of its parts."""
        return f" {self.sign} ".join(texts)

    def atoms(self) -> Iterator[Atom]:
        for part in self.parts:
            yield from part.atoms()

    def check(self, sizes: Sizes) -> None:
        for part in self.parts:
            part.check(sizes)


class _AssociativeOperation(_Operation):
    """`a | b | c` is one node with three parts, so a union built in a loop stays flat."""

    def __init__(self, parts: tuple[Pattern, ...], *, bounded: bool = True) -> None:
        first = parts[0]
        super().__init__((*first.parts, *parts[1:]) if isinstance(first, type(self)) else parts, bounded=bounded)


class Union(_AssociativeOperation):
    """A pair is allowed when any part allows it."""

    sign = "|"
    _precedence = _operand_precedence = 1

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


class Intersection(_AssociativeOperation):
    """A pair is allowed when every part allows it."""

    sign = "&"
    _precedence = _operand_precedence = 2

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


class Difference(_Operation):
    """A pair is allowed when the first part allows it and the second does not."""

    sign = "-"
    _precedence = _operand_precedence = 3  # as in Python, where - binds tighter than & and |

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.parts[0]._allows(sizes, b, h, i, j) & ~self.parts[1]._allows(sizes, b, h, i, j)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return self.parts[0]._spans(sizes, b, h, i) - self.parts[1]._spans(sizes, b, h, i)


class Complement(_Operation):
    """A pair is allowed when the part does not allow it."""

    sign = "~"
    _precedence = _operand_precedence = 4

    def _spell(self, texts: list[str]) -> str:
        return f"~{texts[0]}"

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ~self.parts[0]._allows(sizes, b, h, i, j)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return ~self.parts[0]._spans(sizes, b, h, i)


_OPERATIONS: dict[str, type[_Operation]] = {"|": Union, "&": Intersection, "-": Difference}


def joined(left: Pattern, right: object, sign: str) -> Pattern:
    """The union, intersection or difference of two patterns. Raises OperandError where `right` is not a pattern."""
    return _OPERATIONS[sign]((left, operand(right, sign)))


def looks_back(pattern: Pattern) -> bool:
    """Whether the pattern is `causal()` or an intersection with it: certainly no pair with j > i."""
    if isinstance(pattern, Intersection):
        return any(looks_back(part) for part in pattern.parts)
    return pattern.text == "causal()"


class PerHead(_Operation):
    """Head h uses the h-th part. Planned as the union over distinct parts p of `HeadsOf(heads of p) & p`."""

    sign = ","
    _operand_precedence = 0

    def _spell(self, texts: list[str]) -> str:
        return "per_head([" + ", ".join(texts) + "])"

    def __init__(self, parts: tuple[Pattern, ...]) -> None:
        super().__init__(parts)
        # Texts first, then one part after the other: a router gives each head tables of its own, which `!=` digests.
        others = [part for part in parts if part is not parts[0]]
        if any(part.text != parts[0].text for part in others) or any(part != parts[0] for part in others):
            self._set(varies_over_heads=True)

    def check(self, sizes: Sizes) -> None:
        if sizes.heads != len(self.parts):
            raise PatternError(
                f"per_head was given {len(self.parts)} patterns, but there are {sizes.heads} heads; give one pattern for each."
            )
        super().check(sizes)

    def _batch_and_heads(self) -> tuple[int, int]:
        return super()._batch_and_heads()[0], len(self.parts)

    def groups(self) -> list[tuple[Pattern, tuple[int, ...]]]:
        """Each distinct part with the heads that use it."""
        heads_of: dict[Pattern, list[int]] = {}
        for head, part in enumerate(self.parts):
            heads_of.setdefault(part, []).append(head)
        return [(part, tuple(heads)) for part, heads in heads_of.items()]

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if h.dim() == 4 and h.shape == (1, len(self.parts), 1, 1):
            # All heads at once, as in `dense`: each part is evaluated for its own head only.
            shape = torch.broadcast_shapes(b.shape, h.shape, i.shape, j.shape)
            out = torch.zeros(shape, dtype=torch.bool, device=i.device)
            for head, part in enumerate(self.parts):
                out[:, head : head + 1] = part._allows(sizes, b, h[:, head : head + 1], i, j)
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
    """All pairs of the given heads, none of the others. The planner rewrites `per_head` with it; not in the notation."""

    heads: tuple[int, ...]
    varies_over_heads = True

    def __init__(self, heads: tuple[int, ...]) -> None:
        self._set(heads=heads, text=f"_heads({list(heads)})", tables=())

    def _variation(self, sizes: Sizes) -> Tensor:
        variant = torch.zeros(1, sizes.heads, dtype=torch.int64, device="cpu")
        variant[0, list(self.heads)] = 1
        return variant

    def _member(self, h: Tensor) -> Tensor:
        return torch.isin(h, torch.tensor(self.heads, device=h.device))

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self._member(h)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        return Spans.thin(sizes.n_k, torch.zeros_like(i), self._member(h) * sizes.n_k)

    def _rows_equal(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        return torch.ones_like(first, dtype=torch.bool)


def per_head(patterns: Sequence[Pattern]) -> Pattern:
    """One pattern per head: a pair is allowed in head h when `patterns[h]` allows it.

    Raises PatternError for an empty list and, when used, for another number of heads.

    >>> import farlight as fl
    >>> fl.per_head([fl.window(0), fl.full()]).dense(2, heads=2).int().tolist()
    [[[[1, 0], [0, 1]], [[1, 1], [1, 1]]]]
    """
    patterns = () if isinstance(patterns, Pattern) else read_list("per_head", patterns, "patterns, one for each head")
    if not patterns:
        raise PatternError("per_head needs a list with one pattern for each head; it was given none.")
    return PerHead(tuple(operand(pattern, ",") for pattern in patterns))
