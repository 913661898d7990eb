"""Validation and conversion of constructor arguments: integers, lists, positions, masks and tables.

Tensors and numpy arrays are read alike. A mask is boolean. Integers are positions (or lengths), with one exception: an array
of more than two integers that are all 0 or 1 is ambiguous (a mask of dtype int looks the same) and is refused. Every
function raises PatternError with the name of the argument, the value, and what to pass instead.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farlight.errors import PatternError, refuse_tracing, shorten, show
from farlight.patterns.sizes import Sizes

__all__ = [
    "check_leading",
    "positions_text",
    "query_base",
    "read_integers",
    "read_list",
    "read_mask",
    "read_positions",
    "read_table",
    "whole",
]

# Sums and products of two such integers fit into int64: no distance overflows.
_LARGEST = 2**31
_MOST_LISTED = 2**20  # entries of a list
_SPELLED_OUT = 2**12  # a range of more positions stays a range


def whole(what: str, value: Any, at_least: int, at_most: int = _LARGEST) -> int:
    """`value` as a Python int in `at_least … at_most`; `what` names the argument in the error."""
    try:
        number = operator.index(value)
    except TypeError:
        raise PatternError(f"{what} = {show(value)}: a whole number is needed, not {type(value).__name__}.") from None
    if _is_bool(value) or number < at_least:
        raise PatternError(f"{what} = {show(value)}: it must be a whole number >= {at_least}.")
    if number > at_most:
        raise PatternError(f"{what} is larger than {at_most}, the largest number possible here; no text is so long.")
    return number


def read_list(what: str, values: Any, of: str) -> list[Any]:
    """Any iterable as a list of at most 2^20 entries; `of` names the entries in the error."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or _is_array(values, dims=0):
        raise PatternError(f"{what}({show(values)}): give a list of {of}, not {type(values).__name__}.")
    if isinstance(values, range):  # `len` overflows for ranges beyond 2^63
        values = values[: _MOST_LISTED + 1]
    length = len(values) if isinstance(values, Sized) else 0
    entries = list(itertools.islice(values, _MOST_LISTED + 1)) if length <= _MOST_LISTED else []
    if max(length, len(entries)) > _MOST_LISTED:
        raise PatternError(f"{what}: a list of more than {_MOST_LISTED:,} entries; pass a tensor, such as a mask or ids.")
    return entries


def _is_array(value: Any, *, dims: int | None = None) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and dims in (None, value.ndim)


def _is_bool(value: Any) -> bool:
    """Whether the value is boolean: Python's or numpy's bool, a bool tensor or a bool array."""
    if isinstance(value, Tensor):
        return value.dtype == torch.bool
    return isinstance(value, (bool, np.bool_)) or (isinstance(value, np.ndarray) and value.dtype == np.bool_)


def read_mask(what: str, value: Any) -> Tensor | None:
    """`(B, N)` bool from a bool tensor, a bool array or a (nested) list of bools; None for anything else."""
    first = value
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if not _is_bool(first) or isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (list, tuple)) and not all(map(_is_bool, value)) and not isinstance(value[0], (list, tuple)):
        return None
    if isinstance(value, (list, tuple)):
        value = [item.tolist() if _is_array(item) else item for item in value]
    return read_table(what, value, 2, dtype=torch.bool)


def read_integers(what: str, values: Any, of: str) -> list[Any]:
    """The entries of a list, or of a 1-D integer array that cannot be mistaken for a mask; `of` as in `read_list`."""
    if not _is_array(values):
        return read_list(what, values, of)
    refuse_tracing(what)
    if isinstance(values, Tensor):
        is_integer = not (values.is_floating_point() or values.is_complex())
    else:
        is_integer = values.dtype.kind in "iu"
    if not is_integer or values.ndim != 1:
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
    """Distinct positions in ascending order, negative ones (which count from the end) last.

    A range of more than 4096 positions that all count from one end stays a range.
    """
    if isinstance(positions, range) and len(positions[: _SPELLED_OUT + 1]) > _SPELLED_OUT:
        ends = sorted((positions[0], positions[-1]))
        if max(map(abs, ends)) > _LARGEST:
            raise PatternError(f"{what}: a position lies beyond {_LARGEST}; no text is so long.")
        if (ends[0] < 0) == (ends[1] < 0):
            return range(ends[0], ends[1] + 1, abs(positions.step))
    if isinstance(positions, str) or not isinstance(positions, Iterable) or _is_array(positions, dims=0):
        raise PatternError(f"{what}({show(positions)}): give a list of positions such as [0, -1], a range, or a bool mask.")
    distinct = set()
    for position in read_integers(what, positions, "positions"):
        # operator.index(True) is 1: a list of booleans must not become the positions 0 and 1.
        try:
            entry: Any = None if _is_bool(position) else position
            number = operator.index(entry)
        except TypeError:
            raise PatternError(
                f"{what}: position {show(position)} is not a whole number; give integers or a bool mask."
            ) from None
        if abs(number) > _LARGEST:
            raise PatternError(f"{what}: a position lies beyond {_LARGEST}; no text is so long.")
        distinct.add(number)
    return tuple(sorted(distinct, key=lambda p: (p < 0, p)))


def positions_text(positions: Sequence[int]) -> str:
    """The positions in the notation: `range(64)` where more than four are consecutive, else a list."""
    if isinstance(positions, range):
        start = f"{positions.start}, " if positions.start or positions.step > 1 else ""
        return f"range({start}{positions.stop}" + (f", {positions.step})" if positions.step > 1 else ")")
    if len(positions) > 4 and max(positions) - min(positions) == len(positions) - 1:
        start = f"{min(positions)}, " if min(positions) else ""
        return f"range({start}{max(positions) + 1})"
    return str(list(positions))


def read_table(what: str, value: Any, dims: int, *, dtype: torch.dtype) -> Tensor:
    """A copy of `value` as a tensor of `dims` dimensions; missing leading ones (batch, head) become 1.

    dtype: torch.bool, which accepts bool only, or torch.int64, which accepts every integer dtype. A copy, because a pattern
    must not change when the caller's tensor does.
    """
    try:
        table = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        why = shorten(str(error), 160)
        raise PatternError(f"{what}: cannot be read as a tensor ({why}); pass a torch tensor.") from None
    if dtype == torch.bool and table.dtype != torch.bool:
        raise PatternError(f"{what}: a bool tensor is needed, but this is {show(table)}; pass .bool() of it.")
    if dtype == torch.int64 and (table.dtype.is_floating_point or table.dtype.is_complex or table.dtype == torch.bool):
        raise PatternError(f"{what}: an integer tensor is needed, but this is {show(table)}; pass .long() of it.")
    if not 1 <= table.dim() <= dims:
        raise PatternError(f"{what}: shape {tuple(table.shape)} has {table.dim()} dimensions, at most {dims} are possible.")
    # The pattern outlives this call: a table made in inference mode must be usable in training.
    normal_mode = contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)
    with normal_mode:
        table = table.detach().to(dtype, copy=True)
    return table.reshape((1,) * (dims - table.dim()) + tuple(table.shape))


def check_leading(what: str, table: Tensor, sizes: Sizes, *, heads: bool = True) -> None:
    """Raise PatternError unless the leading dimensions of `table` are 1 or the batch (and, with `heads`, the heads)."""
    if table.shape[0] not in (1, sizes.batch):
        raise PatternError(
            f"{what}: its batch dimension is {table.shape[0]}, but the batch is {sizes.batch}; use 1 or {sizes.batch}."
        )
    if heads and table.shape[1] not in (1, sizes.heads):
        raise PatternError(
            f"{what}: its head dimension is {table.shape[1]}, but there are {sizes.heads} heads; use 1 or {sizes.heads}."
        )


def query_base(what: str, length: int, sizes: Sizes, unit: int = 1) -> int:
    """The query position of row 0 of a table of queries with `length` rows of `unit` positions each.

    0 for a table with rows for all positions of the sequence, `q_offset` for one with rows for the queries only. Raises
    PatternError where `length` fits neither.
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
