"""Calls of the native labels (csrc/content/labels): the nearest columns of a table, and the most recent keys of a label."""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.dispatcher import define
from farlight.kernels.cpu.choose import TYPE_CODES
from farlight.kernels.cpu.launch import as_operand, strided_address
from farlight.kernels.cpu.native import module, unavailable

__all__ = ["can_label", "nearest_labels", "recent_starts"]


def can_label(labels: Tensor) -> bool:
    """Whether the native functions of labels take these: in memory of the host."""
    return labels.device.type == "cpu" and not labels.is_meta and unavailable() is None


def _nearest(x: Tensor, columns: Tensor, mask: Tensor | None) -> Tensor:
    """`(B, H, N)` int64: argmax_c columns[h, c] · x, the lowest c of equals; -1 where the mask is False.

    x: `(B, H_kv, N, D)`, a dtype of the kernels; columns: `(H, C, D)`, H a multiple of H_kv; mask: `(B|1, N)` bool.
    """
    x, columns = as_operand(x, "x"), columns.to(torch.float32).contiguous()
    heads, count, dim = columns.shape
    mask = None if mask is None else mask.to(torch.uint8).contiguous()
    labels = torch.empty(x.shape[0], heads, x.shape[2], dtype=torch.int64, device="cpu")
    if labels.numel():
        sizes = [
            TYPE_CODES[x.dtype],
            x.shape[0],
            heads,
            x.shape[1],
            x.shape[2],
            dim,
            count,
            1 if mask is None else mask.shape[0],
        ]
        addresses = [columns.data_ptr(), 0 if mask is None else mask.data_ptr(), labels.data_ptr()]
        module().nearest(sizes, strided_address(x), addresses, torch.get_num_threads())
    return labels


def _nearest_fake(x: Tensor, columns: Tensor, mask: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], columns.shape[0], x.shape[2]), dtype=torch.int64)


nearest_labels = define("nearest_labels", _nearest, _nearest_fake)


def _recent(query: Tensor, key: Tensor, count: int) -> Tensor:
    """`(B, H, n_q)` int64: the position of the `count`-th most recent key, up to the query's own position, with its label; of
    the earliest where there are fewer, 0 where there is none. query `(B, H, n_q)`, key `(B, H, n_k)`: labels, negative = none.
    """
    query, key = query.contiguous(), key.contiguous()
    starts = torch.empty(query.shape, dtype=torch.int64, device="cpu")
    if starts.numel():
        sizes = [query.shape[0] * query.shape[1], query.shape[2], key.shape[2], count]
        module().recent(sizes, [query.data_ptr(), key.data_ptr(), starts.data_ptr()], torch.get_num_threads())
    return starts


def _recent_fake(query: Tensor, key: Tensor, count: int) -> Tensor:
    return query.new_empty(query.shape)


recent_starts = define("recent_starts", _recent, _recent_fake)
