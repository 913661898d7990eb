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
) -> Tensor:
    """`(B, H or H_kv, lists, width)` int64: the chosen blocks of each query block, ascending, padded with -1.

    numbers: (block, query_block, offset, first, causal, shared, score, budget) of ChoiceProblem. width: -1 = as wide as the
    longest list.
    """
    q, k = as_operand(q, "q"), as_operand(k, "k")
    masks = [None if mask is None else mask.to(torch.uint8).contiguous() for mask in (query_mask, key_mask)]
    addresses = [0 if mask is None else mask.data_ptr() for mask in masks]
    mask_batch = max((mask.shape[0] for mask in masks if mask is not None), default=1)
    shape = [q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]]
    chosen = module().choose(
        [TYPE_CODES[q.dtype], *shape, *addresses, mask_batch, *numbers],
        strided_address(q),
        strided_address(k),
        budget_value,
        scale,
        torch.get_num_threads(),
    )
    choosing_heads = k.shape[1] if numbers[5] else q.shape[1]
    indices = torch.empty(q.shape[0], choosing_heads, lists, chosen.width, dtype=torch.int64, device="cpu")
    if indices.numel():
        chosen.copy_to(indices.data_ptr(), torch.get_num_threads())
    return indices if width < 0 else torch.nn.functional.pad(indices, (0, width - chosen.width), value=-1)


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
) -> Tensor:
    heads = k.shape[1] if numbers[5] else q.shape[1]
    size = torch.library.get_ctx().new_dynamic_size() if width < 0 else width
    return q.new_empty((q.shape[0], heads, lists, size), dtype=torch.int64)


choose_blocks = define("choose_blocks", _choose, _choose_fake)
