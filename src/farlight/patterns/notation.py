"""Patterns as text: the notation of `repr` and of the command line, and JSON.

Both are read without evaluating anything. The notation is the Python expression without the `fl.`; a small walk over its
syntax tree knows the pattern constructors, the presets, `|`, `&`, `-`, `~`, literals, lists and `range`, and nothing else.
Tables are spelled as nested lists, or, above some hundred entries, as `table("dtype", shape, "base64 of zlib")`.
"""

from __future__ import annotations

import ast
import base64
import binascii
import functools
import json
import math
import operator
import re
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from farlight.errors import PatternError, shorten, show
from farlight.patterns.deferred import listed_again
from farlight.patterns.expression import Pattern

__all__ = ["LIMIT", "from_json", "parse", "spell_tables", "to_json"]

_SPELLED_OUT = 256
_MOST_DIMS = 8
_LONGEST_TEXT = 4_000_000
_DEEPEST = 200
# Bytes of a node of Python's syntax tree with the number that it becomes, and of a number that a range is spelled out to.
_NODE, _NUMBER = 256, 128
# Patterns that keep a range as a range.
_KEEP_RANGES = ("global_tokens", "sees_all", "seen_by_all")
LIMIT = 2**28
_TABLE_TYPES = {"bool": torch.bool, "int64": torch.int64}


@functools.cache
def constructors() -> dict[str, Callable[..., Pattern]]:
    """Every name that may be called in the notation."""
    import farlight.patterns as patterns
    from farlight.patterns import presets

    names: dict[str, Callable[..., Pattern]] = {name: getattr(patterns, name) for name in patterns.CONSTRUCTORS}
    for name in presets.__all__:
        names[name] = names[f"presets.{name}"] = getattr(presets, name)
    return names


# ---- tables ----------------------------------------------------------------------------------------------------------
def pack_table(table: Tensor) -> dict[str, Any]:
    data = table.detach().cpu().contiguous()
    packed = base64.b64encode(zlib.compress(data.numpy().tobytes(), 6)).decode("ascii")
    return {"dtype": str(data.dtype).removeprefix("torch."), "shape": list(data.shape), "data": packed}


class _Allowance:
    """Bytes that a text may still ask for; None: any number."""

    def __init__(self, limit: int | None) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise PatternError(f"limit = {limit!r}: it is a number of bytes, a whole number >= 0, or None for no limit.")
        self.limit, self.left = limit, limit

    def take(self, nbytes: int, what: str) -> None:
        """Raise PatternError where this is more than is left."""
        if self.left is None or self.limit is None:
            return
        if nbytes > self.left:
            raise PatternError(
                f"this pattern asks for more than {self.limit:,} bytes of memory ({what}); where it comes from a source that "
                "you trust pass limit=…, a larger number of bytes, or None."
            )
        self.left -= nbytes


def unpack_table(dtype: Any, shape: Any, data: Any, allowance: _Allowance) -> Tensor:
    if not isinstance(dtype, str) or dtype not in _TABLE_TYPES:
        raise PatternError(f"table: dtype {show(dtype)} is not one of {sorted(_TABLE_TYPES)}.")
    if not isinstance(shape, (list, tuple)) or not all(type(n) is int and n >= 0 for n in shape):
        raise PatternError(f"table: shape {show(shape)} is not a list of sizes.")
    if len(shape) > _MOST_DIMS or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise PatternError(f"table: shape {show(shape)} is not that of a tensor.")
    if not isinstance(data, str):
        raise PatternError(f"table: data is {type(data).__name__}, not base64 text.")
    size = math.prod(shape) * _TABLE_TYPES[dtype].itemsize
    allowance.take(size, f"a table of {size:,} bytes")
    try:
        stream = zlib.decompressobj()
        raw = stream.decompress(base64.b64decode(data, validate=True), size + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise PatternError(f"table: the data cannot be read ({error}); it must be base64 of zlib.") from None
    if len(raw) != size:
        raise PatternError(f"table: the data do not hold the {size} bytes of {dtype} {show(tuple(shape))}.")
    if dtype == "bool" and raw.strip(b"\x00\x01"):
        raise PatternError("table: a bool table holds bytes other than 0 and 1.")
    if not size:
        return torch.empty(shape, dtype=_TABLE_TYPES[dtype], device="cpu")
    return torch.frombuffer(bytearray(raw), dtype=_TABLE_TYPES[dtype]).reshape(tuple(shape)).clone()


def spell_tables(text: str, tables: tuple[Tensor, ...]) -> str:
    """`text` with each `$n` replaced by the table it stands for."""

    def spell(mark: re.Match[str]) -> str:
        table = tables[int(mark[1])]
        if table.numel() <= _SPELLED_OUT and table.numel() > 0:
            return str(table.tolist())
        packed = pack_table(table)
        return f"table({packed['dtype']!r}, {packed['shape']}, {packed['data']!r})"

    return re.sub(r"\$(\d+)", spell, text)


# ---- the notation ----------------------------------------------------------------------------------------------------
def parse(text: str, tables: tuple[Tensor, ...] = (), *, limit: int | None = LIMIT) -> Pattern:
    """The pattern that an expression such as `"window(256) | global_tokens([0])"` stands for. Nothing is evaluated.

    `tables` are what `$0`, `$1`, … in the text stand for. `limit` is the largest number of bytes that the tables, lists and
    ranges spelled in the text may take in memory (None: any).
    Raises PatternError that points at the place for anything outside the notation.

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
    allowance = _Allowance(limit)
    # Every node but the first stands behind one of these; none of them is part of a packed table.
    allowance.take(_NODE * sum(map(text.count, ",([|&~-")), f"an expression of {len(text):,} characters")
    marked = re.sub(r"\$(\d+)", r"_table_\1", text.strip()) if tables else text.strip()
    try:
        tree = ast.parse(marked, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
        at = f" at column {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise PatternError(f"cannot read the pattern {shorten(text)!r}{at}: it is not an expression.") from None
    reader = _Reader(text, tables, allowance)
    try:
        pattern = reader.value(tree.body, 0)
    except (RecursionError, MemoryError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else "needs more memory than there is"
        raise PatternError(f"the pattern {shorten(text)!r} {why}.") from None
    if not isinstance(pattern, Pattern):
        raise PatternError(f"{shorten(text)!r} is {type(pattern).__name__}, not a pattern; write for example window(256).")
    return pattern


class _Reader:
    def __init__(self, text: str, tables: tuple[Tensor, ...], allowance: _Allowance) -> None:
        self.text, self.tables, self.allowance = text, tables, allowance

    def fail(self, node: ast.AST, why: str) -> NoReturn:
        column = getattr(node, "col_offset", 0) + 1
        raise PatternError(f"cannot read the pattern {shorten(self.text)!r} at column {column}: {why}")

    def value(self, node: ast.expr, depth: int) -> Any:
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
        """a | b | c …, which leans to the left: read from the left end, so that many parts are not deep."""
        acts = {ast.BitOr: operator.or_, ast.BitAnd: operator.and_, ast.Sub: operator.sub}
        rest = []
        while isinstance(node, ast.BinOp) and type(node.op) in acts:
            rest.append((acts[type(node.op)], node.right))
            node = node.left
        out = self.pattern(node, depth)
        for act, right in reversed(rest):
            out = act(out, self.pattern(right, depth))
        return out

    def pattern(self, node: ast.expr, depth: int) -> Pattern:
        value = self.value(node, depth + 1)
        if not isinstance(value, Pattern):
            self.fail(node, f"a pattern is needed here, not {type(value).__name__}.")
        return value

    def call(self, node: ast.Call, func: ast.expr, args: list[ast.expr], keywords: list[ast.keyword], depth: int) -> Any:
        name = ast.unparse(func).removeprefix("fl.").removeprefix("farlight.")
        if any(keyword.arg is None for keyword in keywords) or any(isinstance(arg, ast.Starred) for arg in args):
            self.fail(node, "* and ** are not part of the notation.")
        given = [self.value(arg, depth + 1) for arg in args]
        named = {str(keyword.arg): self.value(keyword.value, depth + 1) for keyword in keywords}
        if len(named) < len(keywords):
            self.fail(node, "an argument is given twice.")
        if name == "range":
            if named or not 1 <= len(given) <= 3 or any(type(n) is not int for n in given) or 0 in given[2:]:
                self.fail(node, "range needs one to three whole numbers, the third not 0.")
            return range(*given)
        if name == "table":
            if named or len(given) != 3:
                self.fail(node, "table needs a dtype, a shape and data.")
            dtype, shape, data = given
            return unpack_table(dtype, shape, data, self.allowance)
        known = constructors()
        if name not in known:
            near = [other for other in known if "." not in other and other.startswith(name[:3])]
            hint = f"did you mean {near[0]}? " if near else ""
            self.fail(node, f"there is no pattern {show(name)}; {hint}known are {', '.join(n for n in known if '.' not in n)}.")
        for value in (*given, *named.values()):
            if isinstance(value, range) and not (
                name in _KEEP_RANGES and (value.start < 0) == (value[-1] < 0 if value else True)
            ):
                self.allowance.take(_NUMBER * _length(value), f"{name} of {_length(value):,} numbers")
        given = [listed_again(name, _as_table(name, value)) for value in given]
        named = {key: listed_again(f"{name}: {key}", _as_table(name, value)) for key, value in named.items()}
        try:
            return known[name](*given, **named)
        except PatternError:
            raise
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            self.fail(node, f"{name} cannot take these arguments ({shorten(str(error), 120)}).")


def _length(numbers: range) -> int:
    """`len`, of any size."""
    return max(0, -((numbers.start - numbers.stop) // numbers.step))


def _as_table(name: str, value: Any) -> Any:
    """Nested lists of booleans are masks; the constructors read integer lists themselves."""
    first = value
    while isinstance(first, list) and first:
        first = first[0]
    if isinstance(value, list) and isinstance(first, bool):
        try:
            return torch.tensor(value, dtype=torch.bool, device="cpu")
        except (TypeError, ValueError) as error:
            raise PatternError(f"{name}: the mask cannot be read as a table ({shorten(str(error), 120)}).") from None
    return value


# ---- JSON ------------------------------------------------------------------------------------------------------------
def to_json(pattern: Pattern) -> str:
    tables = [pack_table(table) for table in pattern._tables]
    return json.dumps({"farlight": 1, "pattern": pattern.text} | ({"tables": tables} if tables else {}))


def from_json(text: str, *, limit: int | None = LIMIT) -> Pattern:
    allowance = _Allowance(limit)
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError, MemoryError) as error:
        raise PatternError(f"this is not JSON ({error}); pass the text that Pattern.to_json() wrote.") from None
    if not isinstance(data, dict) or not isinstance(data.get("pattern"), str):
        raise PatternError('this JSON is not a pattern: an object with "farlight", "pattern" and perhaps "tables" is needed.')
    if data.get("farlight") != 1:
        raise PatternError(f"this pattern has format {show(data.get('farlight'))}; this version of farlight reads format 1.")
    unknown = sorted(set(data) - {"farlight", "pattern", "tables"})
    if unknown:
        raise PatternError(f"this JSON pattern has unknown fields: {shorten(', '.join(unknown))}.")
    packed = data.get("tables", [])
    if not isinstance(packed, list) or not all(isinstance(t, dict) and set(t) == {"dtype", "shape", "data"} for t in packed):
        raise PatternError('"tables" must be a list of objects with dtype, shape and data.')
    tables = tuple(unpack_table(t["dtype"], t["shape"], t["data"], allowance) for t in packed)
    if tables and len(set(re.findall(r"\$(\d+)", data["pattern"]))) != len(tables):
        raise PatternError(f"the pattern {shorten(data['pattern'])!r} does not use each of its {len(tables)} tables.")
    return parse(data["pattern"], tables, limit=allowance.left)
