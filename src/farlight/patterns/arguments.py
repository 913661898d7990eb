"""Reading the arguments of pattern constructors: whole numbers, lists of positions, masks, tables; and saying what is wrong.

Tensors and numpy arrays are read alike. A mask is boolean. Integers are positions (or lengths), except where an array of
them can only be doubted: more than two entries, all 0 or 1, are refused, for a 0/1 mask looks the same.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterable, Sequence, Sized
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from farlight.errors import PatternError, UnsupportedError, shorten, show
from farlight.patterns.expression import Sizes

__all__ = [
    "check_leading",
    "listed",
    "numbers",
    "positions_text",
    "query_base",
    "read_mask",
    "read_positions",
    "read_table",
    "refuse_tracing",
    "whole",
]


# Sums and products of two such numbers still fit into int64, so that no distance ever wraps around.
_LARGEST = 2**31
# Entries of a list, and those of a range of positions that is spelled out although it need not be.
_MOST_LISTED, _SPELLED_OUT = 2**20, 2**12


def whole(what: str, value: Any, at_least: int, at_most: int = _LARGEST) -> int:
    """A Python integer in `at_least … at_most`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise PatternError(f"{what} = {show(value)}: a whole number is needed, not {type(value).__name__}.") from None
    if _is_bool(value) or number < at_least:
        raise PatternError(f"{what} = {show(value)}: it must be a whole number >= {at_least}.")
    if number > at_most:
        raise PatternError(f"{what} is larger than {at_most}, the largest number possible here; no text is so long.")
    return number


def listed(what: str, values: Any, of: str) -> list[Any]:
    """The values as a list."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or _is_array(values, dims=0):
        raise PatternError(f"{what}({show(values)}): give a list of {of}, not {type(values).__name__}.")
    return _counted(what, values)


def _counted(what: str, values: Iterable[Any]) -> list[Any]:
    """The values as a list, counted before they are spelled out."""
    if isinstance(values, range):  # its length may be of any size
        values = values[: _MOST_LISTED + 1]
    many = len(values) if isinstance(values, Sized) else 0
    read = list(itertools.islice(values, _MOST_LISTED + 1)) if many <= _MOST_LISTED else []
    if max(many, len(read)) > _MOST_LISTED:
        raise PatternError(f"{what}: a list of more than {_MOST_LISTED:,} entries; pass a tensor, such as a mask or ids.")
    return read


def _is_array(value: Any, *, dims: int | None = None) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and dims in (None, value.ndim)


def _is_bool(value: Any) -> bool:
    """Whether this is a truth value: Python's, numpy's, or one entry of a bool tensor."""
    if isinstance(value, Tensor):
        return value.dtype == torch.bool
    return isinstance(value, (bool, np.bool_)) or (isinstance(value, np.ndarray) and value.dtype == np.bool_)


def read_mask(what: str, value: Any) -> Tensor | None:
    """The mask `(B, N)` that a bool tensor, a bool array or a (nested) list of truth values is; None for anything else."""
    first = value
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if not _is_bool(first) or isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (list, tuple)) and not all(map(_is_bool, value)) and not isinstance(value[0], (list, tuple)):
        return None
    if isinstance(value, (list, tuple)):
        value = [item.tolist() if _is_array(item) else item for item in value]
    return read_table(what, value, 2, kind="bool")


def refuse_tracing(who: str) -> NoReturn:
    """Raise UnsupportedError: torch.jit.trace would bake the values of this call into the graph."""
    raise UnsupportedError(
        f"{who}: torch.jit.trace keeps what is read from a tensor as a constant, a mask as the padding of this one example "
        "too. Use torch.export.export, which keeps the masks, or torch.compile."
    )


def numbers(what: str, values: Any, of: str) -> list[Any]:
    """The entries of a list, or of a 1-D array of integers that cannot be taken for a mask."""
    if not _is_array(values):
        return listed(what, values, of)
    if torch._C._get_tracing_state() is not None:
        refuse_tracing(what)
    if isinstance(values, Tensor):
        is_whole = not (values.is_floating_point() or values.is_complex())
    else:
        is_whole = values.dtype.kind in "iu"
    if not is_whole or values.ndim != 1:
        raise PatternError(
            f"{what}({show(values)}): give a 1-D array of whole numbers, the {of}, or a mask: .bool(), in numpy .astype(bool)."
        )
    entries: list[Any] = values.tolist()
    if len(entries) > 2 and all(entry in (0, 1) for entry in entries):
        raise PatternError(
            f"{what}({show(values)}): zeros and ones are a mask or {of}, which cannot be told apart. For a mask pass .bool() "
            f"(numpy: .astype(bool)), for {of} a list: .tolist()."
        )
    return entries


def read_positions(what: str, positions: Iterable[Any]) -> Sequence[int]:
    """Distinct positions, sorted; negative ones count from the end and sort after the others. A long range stays a range."""
    if isinstance(positions, range) and abs(positions.step) == 1 and len(positions[: _SPELLED_OUT + 1]) > _SPELLED_OUT:
        ends = sorted((positions[0], positions[-1]))
        if max(map(abs, ends)) > _LARGEST:
            raise PatternError(f"{what}: a position lies beyond {_LARGEST}; no text is so long.")
        if (ends[0] < 0) == (ends[1] < 0):
            return range(ends[0], ends[1] + 1)
    if isinstance(positions, str) or not isinstance(positions, Iterable) or _is_array(positions, dims=0):
        raise PatternError(f"{what}({show(positions)}): give a list of positions such as [0, -1], a range, or a bool mask.")
    read = set()
    for position in numbers(what, positions, "positions"):
        # True is the number 1 to Python: a list of booleans would name the tokens 0 and 1.
        try:
            entry: Any = None if _is_bool(position) else position
            number = operator.index(entry)
        except TypeError:
            raise PatternError(
                f"{what}: position {show(position)} is not a whole number; give integers or a bool mask."
            ) from None
        if abs(number) > _LARGEST:
            raise PatternError(f"{what}: a position lies beyond {_LARGEST}; no text is so long.")
        read.add(number)
    return tuple(sorted(read, key=lambda p: (p < 0, p)))


def positions_text(positions: Sequence[int]) -> str:
    """`range(0, 64)` where the positions are consecutive and many, else a list."""
    if isinstance(positions, range):
        return f"range({f'{positions.start}, ' if positions.start else ''}{positions.stop})"
    if len(positions) > 4 and max(positions) - min(positions) == len(positions) - 1:
        start = f"{min(positions)}, " if min(positions) else ""
        return f"range({start}{max(positions) + 1})"
    return str(list(positions))


def read_table(what: str, value: Any, dims: int, *, kind: str) -> Tensor:
    """A table as a tensor of `dims` dimensions: missing leading ones (batch, head) become 1.

    `kind` is "bool" or "int". The table is copied, so that a pattern stays what it was when the caller's tensor changes.
    """
    try:
        table = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        why = shorten(str(error), 160)
        raise PatternError(f"{what}: cannot be read as a tensor ({why}); pass a torch tensor.") from None
    if kind == "bool" and table.dtype != torch.bool:
        raise PatternError(f"{what}: a bool tensor is needed, but this is {show(table)}; pass .bool() of it.")
    if kind == "int" and (table.dtype.is_floating_point or table.dtype.is_complex or table.dtype == torch.bool):
        raise PatternError(f"{what}: an integer tensor is needed, but this is {show(table)}; pass .long() of it.")
    if not 1 <= table.dim() <= dims:
        raise PatternError(f"{what}: shape {tuple(table.shape)} has {table.dim()} dimensions, at most {dims} are possible.")
    # A pattern outlives the call that makes it: made in inference mode, it must still serve training.
    keep = contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)
    with keep:
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
