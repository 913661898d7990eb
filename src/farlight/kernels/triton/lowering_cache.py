"""Work tables of a host plan for a device: lowered once, uploaded once, kept in `plan.derived`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from farlight.kernels.triton.device_caps import num_processors
from farlight.kernels.triton.launches import KeyWork, QueryWork
from farlight.kernels.triton.lower_kv import lower_keys
from farlight.kernels.triton.lower_q import lower_queries
from farlight.plan.build import TileShape
from farlight.plan.tables import Plan

__all__ = ["SHAPE", "key_work", "query_work"]

# A gathered pair costs about as much as half a row of a block. The planner splits no rows: `work_partition` does, which knows
# the device.
SHAPE = TileShape(tile=128, gather=32, longest=2**30)


def query_work(plan: Plan, block_m: int, block_n: int, heads_per_kv: int, device: torch.device) -> QueryWork:
    """Tables of the forward and dq passes: groups of `block_m` rows, blocks of `block_n` keys."""
    key = ("triton queries", block_m, block_n, heads_per_kv, device)
    work = plan.derived.get(key)
    if not isinstance(work, QueryWork):
        work = plan.derived[key] = _lowered(lower_queries, plan, block_m, block_n, heads_per_kv, device)
    return work


def key_work(plan: Plan, block_m: int, block_n: int, heads_per_kv: int, device: torch.device) -> KeyWork:
    """Tables of the dk/dv pass: blocks of `block_n` keys, `block_m` rows at a time."""
    key = ("triton keys", block_m, block_n, heads_per_kv, device)
    work = plan.derived.get(key)
    if not isinstance(work, KeyWork):
        work = plan.derived[key] = _lowered(lower_keys, plan, block_m, block_n, heads_per_kv, device)
    return work


def _lowered(lower: Callable[..., Any], plan: Plan, block_m: int, block_n: int, heads_per_kv: int, device: torch.device) -> Any:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        return _uploaded(lower(plan, block_m, block_n, heads_per_kv, num_processors(device)), device)


def _uploaded(value: Any, device: torch.device) -> Any:
    """The same value with every tensor in it on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_uploaded(element, device) for element in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{field.name: _uploaded(getattr(value, field.name), device) for field in fields(value)})
    return value
