"""The order of a term's rows and keys: as they stand, or sorted by label, which makes dense blocks of equal labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.patterns.expression import Sizes
from farlight.patterns.spans import Spans

__all__ = ["Keys", "Order", "natural_order", "sorted_keys", "sorted_order"]


@dataclass
class Order:
    """Query rows in the order of a piece, and its tiles: `rows` None = as they stand."""

    rows: Tensor | None
    row_first: Tensor  # (variants + 1,)
    first: Tensor  # (variants + 1,) tiles
    start: Tensor
    count: Tensor


@dataclass
class Keys:
    """Keys sorted by (variant, label, position): `slots[s]` is the key at slot s; `code` its sorted number."""

    slots: Tensor
    code: Tensor
    query_code: Tensor  # (variants, n_q) number of (variant, label of the row, position 0)

    def map(self, spans: Spans, code: Tensor) -> Spans:
        """Intervals of positions as intervals of slots, among the keys with the row's label."""
        row, lo, hi = spans.listed()
        base = code[row]
        lo, hi = torch.searchsorted(self.code, torch.stack((base + lo, base + hi)))
        return Spans.gather(spans.rows, self.slots.numel(), row, lo, hi)


def natural_order(sizes: Sizes, tile: int, device: torch.device) -> Order:
    start = torch.arange(0, sizes.n_q, tile, device=device)
    count = (sizes.n_q - start).clamp(max=tile)
    one = torch.tensor([0, 1], device=device)
    return Order(None, one * sizes.n_q, one * start.numel(), start, count)


def sorted_order(query: Tensor, tile: int) -> Order:
    """Rows of each variant sorted by (label, row); rows without a label left out; no tile holds two labels."""
    variants, n_q = query.shape
    device = query.device
    order = torch.argsort(query, dim=1, stable=True)
    label = query.gather(1, order)
    kept = label >= 0
    rows, label = order[kept], label[kept]
    variant = torch.arange(variants, device=device)[:, None].expand(-1, n_q)[kept]
    place = torch.arange(rows.numel(), device=device)
    new = torch.ones_like(place, dtype=torch.bool)
    new[1:] = (label[1:] != label[:-1]) | (variant[1:] != variant[:-1])
    group_start = torch.where(new, place, 0).cummax(0).values
    start = place[(place - group_start) % tile == 0]
    count = torch.diff(start, append=torch.tensor([rows.numel()], device=device))
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    row_first = torch.cat((zero, torch.bincount(variant, minlength=variants).cumsum(0)))
    first = torch.cat((zero, torch.bincount(variant[start], minlength=variants).cumsum(0)))
    return Order(rows, row_first, first, start, count)


def sorted_keys(query: Tensor, key: Tensor) -> Keys | None:
    """Keys by (variant, label, position), or None when all labels are 0 and so every key stands where it stood."""
    if not bool(key.any()) and not bool((query > 0).any()):
        return None
    variants, n_k = key.shape
    labels = int(max(query.max(), key.max())) + 1 if query.numel() else int(key.max()) + 1
    labels = max(1, labels)
    device = key.device
    base = torch.arange(variants, device=device)[:, None] * labels
    kept = key >= 0
    code = ((base + key) * n_k + torch.arange(n_k, device=device))[kept]
    code, order = torch.sort(code)
    slots = torch.arange(n_k, device=device).expand(variants, -1)[kept][order]
    return Keys(slots, code, (base + query.clamp(min=0)) * n_k)
