"""Calls of the native choice of key blocks (csrc/content/choose): tensors in, lists of block indices out."""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.dispatcher import define
from farlight.kernels.checks import KERNEL_DTYPES
from farlight.kernels.cpu.launch import as_operand, strided_address
from farlight.kernels.cpu.native import module, unavailable

__all__ = ["BUDGETS", "SCORES", "TYPE_CODES", "can_choose", "choose_blocks"]

TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}  # enum Type in csrc/views.h
SCORES = ("mean", "minmax", "softmax")  # enum BlockScore in csrc/content/choose.h
_INDEX_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BUDGETS = ("count", "share", "mass", "lost")  # enum BudgetKind


def can_choose(q: Tensor) -> bool:
    """Whether the native choice takes these queries: on the CPU, in a dtype of the kernels."""
    return q.device.type == "cpu" and not q.is_meta and q.dtype in KERNEL_DTYPES and unavailable() is None


def _choose(
    q: Tensor,
    k: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    numbers: list[int],
    budget_value: float,
    scale: float,
    lists: int,
    width: int,
    index_bytes: int,
) -> Tensor:
    """`(B, H or H_kv, lists, width)`, integers of `index_bytes` bytes: the chosen blocks of each query block, ascending, padded
    with -1.

    numbers: (block, query_block, offset, first, causal, shared, score, budget) of ChoiceProblem. width: that of the longest
    list that is possible; -1 = as wide as the longest list is.
    """
    q, k = as_operand(q, "q"), as_operand(k, "k")
    masks = [None if mask is None else mask.to(torch.uint8).contiguous() for mask in (query_mask, key_mask)]
    addresses = [0 if mask is None else mask.data_ptr() for mask in masks]
    mask_batch = max((mask.shape[0] for mask in masks if mask is not None), default=1)
    shape = [q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]]
    problem = [TYPE_CODES[q.dtype], *shape, *addresses, mask_batch, *numbers]
    arguments = problem, strided_address(q), strided_address(k), budget_value, scale
    leading, dtype = (q.shape[0], k.shape[1] if numbers[5] else q.shape[1], lists), _INDEX_DTYPES[index_bytes]
    if width >= 0:
        indices = torch.empty(*leading, width, dtype=dtype, device="cpu")
        if indices.numel():
            module().choose_into(*arguments, [indices.data_ptr(), width, index_bytes], torch.get_num_threads())
        return indices
    chosen = module().choose(*arguments, torch.get_num_threads())
    indices = torch.empty(*leading, chosen.width, dtype=dtype, device="cpu")
    if indices.numel():
        chosen.copy_to([indices.data_ptr(), chosen.width, index_bytes], torch.get_num_threads())
    return indices


def _choose_fake(
    q: Tensor,
    k: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    numbers: list[int],
    budget_value: float,
    scale: float,
    lists: int,
    width: int,
    index_bytes: int,
) -> Tensor:
    heads = k.shape[1] if numbers[5] else q.shape[1]
    size = torch.library.get_ctx().new_dynamic_size() if width < 0 else width
    return q.new_empty((q.shape[0], heads, lists, size), dtype=_INDEX_DTYPES[index_bytes])


choose_blocks = define("choose_blocks", _choose, _choose_fake)
