"""Patterns as JSON: `{"farlight": 1, "pattern": text, "tables": [{"dtype", "shape", "data"}, …]}`.

The text is the pattern's canonical expression, in which `$n` stands for the n-th table; the tables are packed by
`table_codec`. Reading parses the text with the notation's parser; nothing is evaluated.
"""

from __future__ import annotations

import json
import re

from farlight.errors import PatternError, shorten, show
from farlight.patterns.expression import Pattern
from farlight.patterns.notation import parse
from farlight.patterns.table_codec import LIMIT, MemoryBudget, pack_table, unpack_table

__all__ = ["from_json", "to_json"]


def to_json(pattern: Pattern) -> str:
    """The pattern as JSON text, tables included."""
    tables = [pack_table(table) for table in pattern._tables]
    return json.dumps({"farlight": 1, "pattern": pattern.text} | ({"tables": tables} if tables else {}))


def from_json(text: str, *, limit: int | None = LIMIT) -> Pattern:
    """The pattern that `to_json` wrote. Raises PatternError for anything else, or beyond `limit` bytes of tables and lists."""
    budget = MemoryBudget(limit)
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
    tables = tuple(unpack_table(table["dtype"], table["shape"], table["data"], budget) for table in packed)
    if tables and len(set(re.findall(r"\$(\d+)", data["pattern"]))) != len(tables):
        raise PatternError(f"the pattern {shorten(data['pattern'])!r} does not use each of its {len(tables)} tables.")
    return parse(data["pattern"], tables, limit=budget.left)
