"""What a host's plan was lowered to for a device: made once, uploaded once, kept with the plan."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from farlight.kernels.triton.device_caps import workers
from farlight.kernels.triton.lower_kv import KeyWork, lower_keys
from farlight.kernels.triton.lower_q import QueryWork, lower_queries
from farlight.plan.build import TileShape
from farlight.plan.tables import Plan

__all__ = ["SHAPE", "key_work", "query_work"]

# A gathered pair costs about as much as half a row of a block; long rows are cut when the device is known.
SHAPE = TileShape(tile=128, gather=32, longest=2**30)


def query_work(plan: Plan, rows: int, keys: int, group: int, device: torch.device) -> QueryWork:
    """The lists for groups of `rows` rows, blocks of `keys` keys, `group` query heads for each key head."""
    key = ("triton queries", rows, keys, group, device)
    found = plan.derived.get(key)
    if not isinstance(found, QueryWork):
        found = plan.derived[key] = _made(lower_queries, plan, rows, keys, group, device)
    return found


def key_work(plan: Plan, rows: int, keys: int, group: int, device: torch.device) -> KeyWork:
    """The lists for blocks of `keys` keys against `rows` rows at a time."""
    key = ("triton keys", rows, keys, group, device)
    found = plan.derived.get(key)
    if not isinstance(found, KeyWork):
        found = plan.derived[key] = _made(lower_keys, plan, rows, keys, group, device)
    return found


def _made(lower: Any, plan: Plan, rows: int, keys: int, group: int, device: torch.device) -> Any:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        return _uploaded(lower(plan, rows, keys, group, workers(device)), device)


def _uploaded(value: Any, device: torch.device) -> Any:
    """The same tables on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_uploaded(one, device) for one in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{field.name: _uploaded(getattr(value, field.name), device) for field in fields(value)})
    return value
