"""The notation: patterns as text, written by `repr` and read by `parse`, the command line and JSON.

The text is the Python expression without `fl.`. `parse` lets Python's own parser build the syntax tree and walks it: it
accepts registered constructors, `|`, `&`, `-`, `~`, literals, lists, `range(…)` and `table(…)`, and evaluates nothing. Memory
is charged to a budget before it is allocated, so hostile text fails early. Tables are written as nested lists, or, above 256
entries, as `table("dtype", shape, "base64 of zlib")`.
"""

from __future__ import annotations

import ast
import operator
import re
from typing import Any, NoReturn

import torch
from torch import Tensor

from farlight.errors import PatternError, shorten, show
from farlight.patterns.deferred import restore_list
from farlight.patterns.expression import Pattern
from farlight.patterns.registry import constructors
from farlight.patterns.table_codec import LIMIT, MemoryBudget, pack_table, unpack_table

__all__ = ["name_tables", "parse", "spell_tables"]

_SPELLED_OUT = 256  # entries of a table written as nested lists
_LONGEST_TEXT = 4_000_000
_DEEPEST = 200
# Upper bounds in bytes: a node of Python's syntax tree with the value it becomes; an entry of an expanded range.
_NODE_BYTES, _ENTRY_BYTES = 256, 128
# Constructors that keep a range as a range.
_KEEP_RANGES = ("global_tokens", "sees_all", "seen_by_all")
_SET_OPERATORS = {ast.BitOr: operator.or_, ast.BitAnd: operator.and_, ast.Sub: operator.sub}


def spell_tables(text: str, tables: tuple[Tensor, ...]) -> str:
    """`text` with each `$n` replaced by table n in the notation."""

    def spell(mark: re.Match[str]) -> str:
        table = tables[int(mark[1])]
        if 0 < table.numel() <= _SPELLED_OUT:
            return str(table.tolist())
        packed = pack_table(table)
        return f"table({packed['dtype']!r}, {packed['shape']}, {packed['data']!r})"

    return re.sub(r"\$(\d+)", spell, text)


def name_tables(text: str, tables: tuple[Tensor, ...]) -> str:
    """`spell_tables` for people: a table that is not written as a list is named by its type and size."""

    def name(mark: re.Match[str]) -> str:
        table = tables[int(mark[1])]
        if 0 < table.numel() <= _SPELLED_OUT:
            return str(table.tolist())
        dtype = "bool" if table.dtype == torch.bool else "int64"
        return f"{dtype} {' × '.join(map(str, table.shape))}"

    return re.sub(r"\$(\d+)", name, text)


def parse(text: str, tables: tuple[Tensor, ...] = (), *, limit: int | None = LIMIT) -> Pattern:
    """The pattern of an expression such as `"window(256) | global_tokens([0])"`. Parsed, never evaluated.

    tables: the tensors of `$0`, `$1`, … in the text. limit: the largest number of bytes that the tables, lists and ranges
    written in the text may take in memory (None: any). Raises PatternError, with the column, for anything outside the
    notation.

    >>> import farlight as fl
    >>> fl.parse("window(256) | global_tokens([0, -1])") == fl.window(256) | fl.global_tokens([0, -1])
    True
    """
    if not isinstance(text, str) or not text.strip():
        raise PatternError("the pattern expression is empty; write for example window(256) | global_tokens([0]).")
    if len(text) > _LONGEST_TEXT:
        raise PatternError(
            f"the pattern expression has {len(text)} characters, more than {_LONGEST_TEXT}; use JSON for large tables."
        )
    budget = MemoryBudget(limit)
    # Every syntax node but the first follows one of these characters, which base64 does not contain.
    budget.charge(_NODE_BYTES * sum(map(text.count, ",([|&~-")), f"an expression of {len(text):,} characters")
    source = re.sub(r"\$(\d+)", r"_table_\1", text.strip()) if tables else text.strip()
    try:
        tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
        place = f" at column {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        why = bracket_fault(text) or f"{place}: it is not an expression."
        raise PatternError(f"cannot read the pattern {shorten(text)!r}{why}") from None
    reader = _Reader(text, tables, budget)
    try:
        pattern = reader.value(tree.body, 0)
    except (RecursionError, MemoryError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else "needs more memory than there is"
        raise PatternError(f"the pattern {shorten(text)!r} {why}.") from None
    if not isinstance(pattern, Pattern):
        raise PatternError(f"{shorten(text)!r} is {type(pattern).__name__}, not a pattern; write for example window(256).")
    return pattern


def bracket_fault(text: str) -> str | None:
    """In words, the first bracket that is not closed or not opened, with its column; None where brackets match.

    >>> bracket_fault("window(3 | (causal()")
    ': the ( at column 7 is never closed; write ) where it ends.'
    """
    opened: list[tuple[str, int]] = []
    for column, mark in enumerate(text, 1):
        if mark in "([":
            opened.append((mark, column))
        elif mark in ")]":
            if not opened or opened[-1][0] + mark not in ("()", "[]"):
                found = f"closes the {opened[-1][0]} at column {opened[-1][1]}" if opened else "has no opening bracket"
                return f": the {mark} at column {column} {found}; brackets stand in pairs."
            opened.pop()
    if not opened:
        return None
    mark, column = opened[0]
    return f": the {mark} at column {column} is never closed; write {')' if mark == '(' else ']'} where it ends."


class _Reader:
    """Recursive descent over Python's syntax tree of one expression."""

    def __init__(self, text: str, tables: tuple[Tensor, ...], budget: MemoryBudget) -> None:
        self.text, self.tables, self.budget = text, tables, budget

    def fail(self, node: ast.AST, why: str) -> NoReturn:
        """Raise PatternError with the column of `node`."""
        column = getattr(node, "col_offset", 0) + 1
        raise PatternError(f"cannot read the pattern {shorten(self.text)!r} at column {column}: {why}")

    def value(self, node: ast.expr, depth: int) -> Any:
        """The value of a node: a pattern, literal, list, range or table."""
        if depth > _DEEPEST:
            self.fail(node, f"it is nested more than {_DEEPEST} deep.")
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as constant):
                return constant
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self.value(item, depth + 1) for item in items]
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                number = self.value(inner, depth + 1)
                if isinstance(number, bool) or not isinstance(number, (int, float)):
                    self.fail(node, "a minus sign may only stand before a number.")
                return -number
            case ast.UnaryOp(op=ast.Invert(), operand=inner):
                return ~self.pattern(inner, depth)
            case ast.BinOp(op=ast.BitOr() | ast.BitAnd() | ast.Sub()):
                return self.chain(node, depth)
            case ast.Call(func=func, args=args, keywords=keywords):
                return self.call(node, func, args, keywords, depth)
            case ast.Name(id=name) if name.startswith("_table_") and name[7:].isdigit() and int(name[7:]) < len(self.tables):
                return self.tables[int(name[7:])]
            case ast.Name(id=name) if name in constructors():
                self.fail(node, f"{name} must be called, as in {name}(…).")
        self.fail(node, "only pattern names, presets, |, &, -, ~, numbers, lists and range(…) may stand here.")

    def chain(self, node: ast.expr, depth: int) -> Pattern:
        """`a | b | c …` from the left end in a loop: the tree leans left, and many parts would exceed the depth limit."""
        operations = []
        while isinstance(node, ast.BinOp) and type(node.op) in _SET_OPERATORS:
            operations.append((_SET_OPERATORS[type(node.op)], node.right))
            node = node.left
        out = self.pattern(node, depth)
        for operation, right in reversed(operations):
            out = operation(out, self.pattern(right, depth))
        return out

    def pattern(self, node: ast.expr, depth: int) -> Pattern:
        """The value of a node, which must be a pattern."""
        value = self.value(node, depth + 1)
        if not isinstance(value, Pattern):
            self.fail(node, f"a pattern is needed here, not {type(value).__name__}.")
        return value

    def call(self, node: ast.Call, func: ast.expr, args: list[ast.expr], keywords: list[ast.keyword], depth: int) -> Any:
        """The value of `name(…)`: a range, a packed table, or what a registered constructor returns."""
        name = ast.unparse(func).removeprefix("fl.").removeprefix("farlight.")
        if any(keyword.arg is None for keyword in keywords) or any(isinstance(arg, ast.Starred) for arg in args):
            self.fail(node, "* and ** are not part of the notation.")
        values = [self.value(arg, depth + 1) for arg in args]
        named = {str(keyword.arg): self.value(keyword.value, depth + 1) for keyword in keywords}
        if len(named) < len(keywords):
            self.fail(node, "an argument is given twice.")
        if name == "range":
            if named or not 1 <= len(values) <= 3 or any(type(n) is not int for n in values) or 0 in values[2:]:
                self.fail(node, "range needs one to three whole numbers, the third not 0.")
            return range(*values)
        if name == "table":
            if named or len(values) != 3:
                self.fail(node, "table needs a dtype, a shape and data.")
            dtype, shape, data = values
            return unpack_table(dtype, shape, data, self.budget)
        return self.construct(node, name, values, named)

    def construct(self, node: ast.Call, name: str, values: list[Any], named: dict[str, Any]) -> Pattern:
        """The registered constructor `name`, called."""
        known = constructors()
        if name not in known:
            near = [other for other in known if "." not in other and other.startswith(name[:3])]
            hint = f"did you mean {near[0]}? " if near else ""
            self.fail(node, f"there is no pattern {show(name)}; {hint}known are {', '.join(n for n in known if '.' not in n)}.")
        for value in (*values, *named.values()):
            # Every constructor but _KEEP_RANGES expands a range to a list; those do too where it crosses from -1 to 0.
            if isinstance(value, range) and not (
                name in _KEEP_RANGES and (value.start < 0) == (value[-1] < 0 if value else True)
            ):
                self.budget.charge(_ENTRY_BYTES * _length(value), f"{name} of {_length(value):,} numbers")
        values = [restore_list(name, _as_table(name, value)) for value in values]
        named = {key: restore_list(f"{name}: {key}", _as_table(name, value)) for key, value in named.items()}
        try:
            return known[name](*values, **named)
        except PatternError:
            raise
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            self.fail(node, f"{name} cannot take these arguments ({shorten(str(error), 120)}).")


def _length(numbers: range) -> int:
    """`len(numbers)`, which itself overflows beyond 2^63."""
    return max(0, -((numbers.start - numbers.stop) // numbers.step))


def _as_table(name: str, value: Any) -> Any:
    """A nested list of booleans as a bool tensor, anything else as it is: constructors read integer lists themselves."""
    first = value
    while isinstance(first, list) and first:
        first = first[0]
    if isinstance(value, list) and isinstance(first, bool):
        try:
            return torch.tensor(value, dtype=torch.bool, device="cpu")
        except (TypeError, ValueError) as error:
            raise PatternError(f"{name}: the mask cannot be read as a table ({shorten(str(error), 120)}).") from None
    return value
