"""Detecting, on the CPU, operations that would synchronise with a device: reads of values, data-dependent shapes, copies."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["SyncCounter"]

_SYNCHRONISING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "histc",
    "equal",
    "is_nonzero",
    # The last operator of `torch.tensor([...])`: a copy from the host.
    "lift_fresh",
)


class SyncCounter(TorchDispatchMode):
    """Within it `calls` lists the operations that would synchronise with a device, `tolist` among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._tolist: Callable[[Tensor], Any] = Tensor.tolist

    def __enter__(self) -> SyncCounter:
        calls, tolist = self.calls, self._tolist

        def counted(x: Tensor) -> Any:
            calls.append(f"tolist of {x.numel()}")
            return tolist(x)

        Tensor.tolist = counted  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(error_type, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        is_copy = name == "_to_copy" and kwargs.get("device") is not None
        if is_copy or name in _SYNCHRONISING or _indexes_by_mask(name, args) or _has_data_dependent_length(func, kwargs):
            self.calls.append(name)
        return func(*args, **kwargs)


def _indexes_by_mask(name: str, args: Any) -> bool:
    """Indexing by a bool tensor begins with `nonzero`."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _has_data_dependent_length(func: Any, kwargs: Any) -> bool:
    return str(func) == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None
