"""`Plan.to_block_mask`: a plan's pairs as a BlockMask of FlexAttention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from farlight.plan.tables import Plan

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["to_block_mask"]


def to_block_mask(plan: Plan, block: int, device: torch.device | str) -> BlockMask:
    """See `Plan.to_block_mask`. Rows of one block at a time are formed densely, and kept of blocks that are allowed in part."""
    from torch.nn.attention.flex_attention import BlockMask

    pattern, sizes = plan.pattern, plan.sizes
    batch, heads = (sizes.batch if pattern.varies_over_batch else 1), (sizes.heads if pattern.varies_over_heads else 1)
    rows, columns = -(-sizes.n_q // block), -(-sizes.n_k // block)
    some = torch.zeros(batch, heads, rows, columns, dtype=torch.bool)
    every, number = torch.zeros_like(some), torch.zeros(some.shape, dtype=torch.int64)
    # Flex reads the mask function everywhere where it is not compiled: two tiles stand for the empty and the full blocks.
    parts = [torch.zeros(1, block, block, dtype=torch.bool), torch.ones(1, block, block, dtype=torch.bool)]
    kept = 2
    for r in range(rows):
        allowed = pattern.dense_rows(r * block, min((r + 1) * block, sizes.n_q), sizes)
        edges = (0, columns * block - sizes.n_k, 0, block - allowed.shape[2])
        tiles = torch.nn.functional.pad(allowed, edges).unflatten(3, (columns, block)).transpose(2, 3)
        some[:, :, r] = tiles.flatten(3).any(-1)
        every[:, :, r] = tiles.flatten(3).all(-1)
        is_part = some[:, :, r] & ~every[:, :, r]
        parts.append(tiles[is_part])
        number[:, :, r][is_part] = torch.arange(kept, kept + parts[-1].shape[0])
        kept += parts[-1].shape[0]
    number[every] = 1
    table, number = torch.cat(parts).to(device), number.to(device)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        at = (b if batch > 1 else b * 0, h if heads > 1 else h * 0, q_idx // block, kv_idx // block)
        allowed: Tensor = table[number[at], q_idx % block, kv_idx % block]
        return allowed

    (partial, at_partial), (full, at_full) = (_ordered(x.to(device)) for x in (some & ~every, every))
    lengths = (sizes.n_q, sizes.n_k)
    return BlockMask.from_kv_blocks(
        partial, at_partial, full, at_full, BLOCK_SIZE=(block, block), mask_mod=mask_mod, seq_lengths=lengths
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(counts, indices), int32: the True columns first, in ascending order."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
