"""Reading the arguments of pattern constructors: whole numbers, lists of positions, tables; and saying what is wrong."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError
from farlight.patterns.base import Sizes

__all__ = ["check_leading", "listed", "positions_text", "query_base", "read_positions", "read_table", "whole"]


# Sums and products of two such numbers still fit into int64, so that no distance ever wraps around.
_LARGEST = 2**31


def whole(what: str, value: Any, at_least: int, at_most: int = _LARGEST) -> int:
    """A Python integer in `at_least … at_most`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise PatternError(f"{what} = {value!r}: a whole number is needed, not {type(value).__name__}.") from None
    if isinstance(value, bool) or number < at_least:
        raise PatternError(f"{what} = {value!r}: it must be a whole number >= {at_least}.")
    if number > at_most:
        raise PatternError(f"{what} is larger than {at_most}, the largest number possible here; no text is so long.")
    return number


def listed(what: str, values: Any, of: str) -> list[Any]:
    """The values as a list."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise PatternError(f"{what}({values!r}): give a list of {of}, not {type(values).__name__}.")
    return list(values)


def read_positions(what: str, positions: Iterable[Any]) -> tuple[int, ...]:
    """Distinct positions, sorted; negative ones count from the end and sort after the others."""
    if isinstance(positions, str) or not isinstance(positions, Iterable):
        raise PatternError(f"{what}({positions!r}): give a list of positions such as [0, -1], a range, or a bool mask.")
    read = set()
    for position in positions:
        # True is the number 1 to Python: a list of booleans would name the tokens 0 and 1.
        try:
            number: Any = None if isinstance(position, bool) else position
            read.add(operator.index(number))
        except TypeError:
            raise PatternError(f"{what}: position {position!r} is not a whole number; give integers or a bool mask.") from None
    return tuple(sorted(read, key=lambda p: (p < 0, p)))


def positions_text(positions: Sequence[int]) -> str:
    """`range(0, 64)` where the positions are consecutive and many, else a list."""
    if len(positions) > 4 and max(positions) - min(positions) == len(positions) - 1:
        start = f"{min(positions)}, " if min(positions) else ""
        return f"range({start}{max(positions) + 1})"
    return str(list(positions))


def read_table(what: str, value: Any, dims: int, *, kind: str) -> Tensor:
    """A table as a tensor of `dims` dimensions: missing leading ones (batch, head) become 1.

    `kind` is "bool" or "int". The table is copied, so that a pattern stays what it was when the caller's tensor changes.
    """
    try:
        table = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PatternError(f"{what}: cannot be read as a tensor ({error}); pass a torch tensor.") from None
    if kind == "bool" and table.dtype != torch.bool:
        raise PatternError(f"{what}: a bool tensor is needed, but its dtype is {table.dtype}; pass e.g. {what} != 0.")
    if kind == "int" and (table.dtype.is_floating_point or table.dtype.is_complex or table.dtype == torch.bool):
        raise PatternError(f"{what}: an integer tensor is needed, but its dtype is {table.dtype}; pass e.g. .long().")
    if not 1 <= table.dim() <= dims:
        raise PatternError(f"{what}: shape {tuple(table.shape)} has {table.dim()} dimensions, at most {dims} are possible.")
    table = table.detach().clone() if kind == "bool" else table.detach().to(torch.int64, copy=True)
    return table.reshape((1,) * (dims - table.dim()) + tuple(table.shape))


def check_leading(what: str, table: Tensor, sizes: Sizes, *, heads: bool = True) -> None:
    """The table's leading dimensions must be 1 or those of the problem."""
    if table.shape[0] not in (1, sizes.batch):
        raise PatternError(
            f"{what}: its batch dimension is {table.shape[0]}, but the batch is {sizes.batch}; use 1 or {sizes.batch}."
        )
    if heads and table.shape[1] not in (1, sizes.heads):
        raise PatternError(
            f"{what}: its head dimension is {table.shape[1]}, but there are {sizes.heads} heads; use 1 or {sizes.heads}."
        )


def query_base(what: str, length: int, sizes: Sizes, unit: int = 1) -> int:
    """The position of the first row of a table of queries: 0 when it has a row for every position, q_offset when it has
    one for every query.
    """
    if length == -(-sizes.n_k // unit):
        return 0
    if length == -(-sizes.n_q // unit):
        return sizes.q_offset
    each = f" (blocks of {unit})" if unit > 1 else ""
    raise PatternError(
        f"{what}: it has {length} rows{each}, but there are {sizes.n_q} queries and {sizes.n_k} positions; "
        f"give {-(-sizes.n_q // unit)} rows, one for each query, or {-(-sizes.n_k // unit)}, one for each position."
    )
