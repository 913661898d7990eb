"""Counting, on the CPU, what would make the host wait for a device: reads of values, lengths that depend on values, copies."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Waits"]

_ALWAYS = (
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
    # What `torch.tensor([...])` ends with: numbers of the host on their way to a device.
    "lift_fresh",
)


class Waits(TorchDispatchMode):
    """Within it `seen` lists the operations at which the host would wait for a device, `tolist` among them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._tolist: Callable[[Tensor], Any] = Tensor.tolist

    def __enter__(self) -> Waits:
        seen, tolist = self.seen, self._tolist

        def counted(x: Tensor) -> Any:
            seen.append(f"tolist of {x.numel()}")
            return tolist(x)

        Tensor.tolist = counted  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        moved = name == "_to_copy" and kwargs.get("device") is not None
        if moved or name in _ALWAYS or _by_mask(name, args) or _of_unknown_length(func, kwargs):
            self.seen.append(name)
        return func(*args, **kwargs)


def _by_mask(name: str, args: Any) -> bool:
    """Indexing by a bool tensor begins with `nonzero`."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _of_unknown_length(func: Any, kwargs: Any) -> bool:
    return str(func) == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None
