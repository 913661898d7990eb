"""The work tables of the Triton kernels, read back in plain torch: how often each pair would be computed."""

from __future__ import annotations

import torch
from torch import Tensor

from farlight.kernels.triton.launches import KeyWork, QueryWork
from farlight.patterns import Sizes

__all__ = ["pairs_of_key_work", "pairs_of_query_work"]


def allowed_pairs(data: Tensor, column: Tensor, row: Tensor, block: list[int]) -> Tensor:
    """The device function `allowed_pairs` of `jit/masks.py`, in torch."""
    lo, hi, bounds, bits = block
    low, high = torch.full_like(row, lo), torch.full_like(row, hi)
    if bounds >= 0:
        low, high = lo + data[bounds + 2 * row], hi + data[bounds + 2 * row + 1]
    allowed = (column >= low) & (column < high)
    if bits >= 0:
        place = (column - lo).clamp(0, 127)
        allowed = allowed & ((data[bits + 4 * row + place // 32] >> (place % 32)) & 1 == 1)
    return allowed & (column >= lo) & (column < hi)


def pairs_of_query_work(query_work: QueryWork, sizes: Sizes, width: int) -> Tensor:
    """`(B, H, n_q, n_k)`: how often the forward and dq passes compute each pair."""
    times = torch.zeros(sizes.batch, sizes.heads, sizes.n_q, sizes.n_k, dtype=torch.int64)
    column = torch.arange(width)
    for work, launch in query_work.steps():
        data, keys = work.data.long(), work.keys.long()
        partials = []
        for b, h, start, count, tile, is_sorted, w0, w1, k0, k1, m0, m1, p0, p1, partial in launch.work.tolist():
            s = torch.arange(count)
            rows = work.rows[start + s].long() if is_sorted else start + s
            partials += [partial] if partial >= 0 else []
            for first in work.whole[w0:w1].tolist():
                times[b, h, rows[:, None], first + column] += 1
            for first in work.whole[k0:k1].tolist():
                times[b, h, rows[:, None], keys[first + column]] += 1
            for first, *block in work.masked[m0:m1].tolist():
                inside = column[(column >= block[0]) & (column < block[1])]
                allowed = allowed_pairs(data, inside[None, :], tile + s[:, None], block)
                key = first + inside if first >= 0 else keys[-1 - first + inside]
                times[b, h, rows[:, None], key] += allowed.long()
            point = work.point_key[p0:p1].long(), rows[work.point_row[p0:p1].long()]
            times[b, h].index_put_((point[1], point[0]), torch.ones_like(point[0]), accumulate=True)
        assert sorted(partials) == list(range(launch.num_partials))
        merged = sum(launch.merges[:, -1].tolist())
        assert merged == launch.num_partials
        assert bool(launch.merges.shape[0]) == bool(merged)
    return times


def pairs_of_key_work(key_work: KeyWork, sizes: Sizes, group: int) -> Tensor:
    """`(B, H, n_q, n_k)`: how often the dk/dv pass computes each pair. Checks that no two programs of a launch own one key."""
    times = torch.zeros(sizes.batch, sizes.heads, sizes.n_q, sizes.n_k, dtype=torch.int64)
    for work, launch in key_work.steps():
        data = work.data.long()
        owned = torch.zeros(sizes.batch, sizes.heads // group, sizes.n_k, dtype=torch.int64)
        for item, (b, kv, start, count, partial) in enumerate(launch.work.tolist()):
            column = torch.arange(count)
            key = work.keys[start + column].long() if launch.sorted_keys else start + column
            if partial < 0:
                owned[b, kv, key] += 1
            for g, (w0, w1, m0, m1, p0, p1) in enumerate(launch.ranges[item].view(group, 6).tolist()):
                h = kv * group + g
                for masked, items in ((False, launch.whole[w0:w1]), (True, launch.masked[m0:m1])):
                    for first, lo, hi, bounds, bits, rows, tile in items.tolist():
                        s = torch.arange(rows)
                        row = first + s if first >= 0 else work.rows[-1 - first + s].long()
                        allowed = torch.ones(rows, count, dtype=torch.bool)
                        if masked:
                            allowed = allowed_pairs(data, column[None, :], tile + s[:, None], [lo, hi, bounds, bits])
                        times[b, h, row[:, None], key] += allowed.long()
                point = launch.point_row[p0:p1].long(), launch.point_key[p0:p1].long()
                assert bool(((point[1] >= start) & (point[1] < start + count)).all())
                times[b, h].index_put_(point, torch.ones_like(point[0]), accumulate=True)
        for b, kv, start, count, is_sorted, _, _ in launch.merges.tolist():
            owned[b, kv, work.keys[start : start + count].long() if is_sorted else torch.arange(start, start + count)] += 1
        assert bool((owned <= 1).all())
        assert launch.add or bool((owned == 1).all())
    return times
