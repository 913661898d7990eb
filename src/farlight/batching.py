"""What `torch.vmap` makes of the operators: the mapped dimension joins the batch, or, where that would not be the same, the
operator runs once for each element of it.

Once for each: with dropout, which draws by the number of the batch item, and for patterns that name batch items in their text
(`padding([3, 5])`). Tables of a pattern may be mapped too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from farlight.patterns.notation import parse

__all__ = ["batched", "batched_by_item", "batched_mask"]

_Dims = Sequence[int | None]


def batched(
    operator: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any, dropout_at: int = -2
) -> tuple[tuple[Tensor, ...], int]:
    """The rule of an operator (tensors that begin with the batch …, tables, seed, text, …, dropout, backend)."""
    at = next(place for place, x in enumerate(args) if isinstance(x, (list, tuple)))
    tensors, (tables, seed, text, *options) = args[:at], args[at:]
    dims, table_dims, seed_dim = in_dims[:at], in_dims[at], in_dims[at + 1]
    size, batch, dropout = info.batch_size, _items(tensors[0], dims[0]), options[dropout_at]
    if dropout or _names_items(text, tables, table_dims, batch):
        parts = [
            operator(
                *(_element(x, dim, n) for x, dim in zip(tensors, dims, strict=True)),
                [_element(x, dim, n) for x, dim in zip(tables, table_dims, strict=True)],
                _element(seed, seed_dim, n),
                text,
                *options,
            )
            for n in range(size)
        ]
        return tuple(torch.stack(part) for part in zip(*parts, strict=True)), 0
    found = operator(
        *(_joined(x, dim, size, batch) for x, dim in zip(tensors, dims, strict=True)),
        _joined_tables(tables, table_dims, size, batch),
        _element(seed, seed_dim, 0),  # read by dropout alone
        text,
        *options,
    )
    return tuple(x.unflatten(0, (size, batch)) for x in found), 0


def batched_by_item(
    operator: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any
) -> tuple[tuple[Tensor, ...], int]:
    """The rule of an operator whose tensors do not all begin with the batch: once for each element of the mapped dimension."""
    parts = [operator(*(_argument(x, dim, n) for x, dim in zip(args, in_dims, strict=True))) for n in range(info.batch_size)]
    return tuple(torch.stack(part) for part in zip(*parts, strict=True)), 0


def _argument(x: Any, dim: Any, n: int) -> Any:
    if isinstance(x, (list, tuple)):
        return [_element(item, of_item, n) for item, of_item in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, n)


def batched_mask(operator: Callable[..., Tensor], info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
    """The rule of `pattern_mask`."""
    like, tables, text, *sizes, batch, heads = args
    size, table_dims = info.batch_size, in_dims[1]
    like = _element(like, in_dims[0], 0)
    if _names_items(text, tables, table_dims, batch):
        elements = ([_element(x, dim, n) for x, dim in zip(tables, table_dims, strict=True)] for n in range(size))
        return torch.stack([operator(like, element, text, *sizes, batch, heads) for element in elements]), 0
    mask = operator(like, _joined_tables(tables, table_dims, size, batch), text, *sizes, size * batch, heads)
    return mask.expand(size * batch, *mask.shape[1:]).unflatten(0, (size, batch)), 0


def _items(x: Tensor, dim: int | None) -> int:
    """The batch of one element."""
    return x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]


def _element(x: Tensor, dim: int | None, n: int) -> Tensor:
    return x if dim is None else x.select(dim, n)


def _joined(x: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """`(size · batch, …)`: the mapped dimension joined with the batch, which was 1 or `batch`."""
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(size, batch, *x.shape[2:]).flatten(0, 1)


def _joined_tables(tables: Sequence[Tensor], dims: _Dims, size: int, batch: int) -> list[Tensor]:
    # A table that says the same of every item stays as it is.
    return [x if dim is None and x.shape[0] == 1 else _joined(x, dim, size, batch) for x, dim in zip(tables, dims, strict=True)]


def _names_items(text: str, tables: Sequence[Tensor], dims: _Dims, batch: int) -> bool:
    """Whether the text itself, its tables left aside, tells batch items apart."""
    if batch == 1:
        return False
    first = tuple(_element(x, dim, 0)[:1] for x, dim in zip(tables, dims, strict=True))
    return parse(text, first).varies_over_batch
