"""`Channel`: the collectives of one process group, on packed bytes, with errors that say what was lost.

Tensors of any dtype travel as bytes, one message per pair of ranks: gloo cannot reduce or exchange bfloat16, and several dtypes
share one collective. Nothing is reduced by the backend: what is to be added arrives, and is added in rank order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from farlight.errors import ArgumentError, DistributedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Channel", "Shape", "pack", "unpack"]

# torch 2.13 renamed it.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
# Shape and dtype of a tensor within a message.
Shape = tuple[tuple[int, ...], torch.dtype]


class Channel:
    """A process group (None: the default one). All methods are collective: every rank calls them in the same order.

    `observers`: called with (name, bytes to each rank, bytes from each rank) of every exchange; for tests and measurements.

    Methods raise DistributedError where a rank is lost or does not answer within the group's time-out.
    """

    observers: ClassVar[list[Callable[[str, list[int], list[int]], None]]] = []

    def __init__(self, group: ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ArgumentError("there is no process group; call torch.distributed.init_process_group first.")
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ArgumentError("this process is not a member of the given group; call on the members only.")

    def exchange(self, name: str, send: Tensor, to_each: Sequence[int], from_each: Sequence[int]) -> Callable[[], Tensor]:
        """Start an all-to-all of bytes `(sum(to_each),)` uint8; the result waits and gives what arrived, in rank order."""
        received = torch.empty(sum(from_each), dtype=torch.uint8, device=send.device)
        for observer in self.observers:
            observer(name, list(to_each), list(from_each))
        with self._failing(name):
            work = dist.all_to_all_single(received, send, list(from_each), list(to_each), group=self.group, async_op=True)

        def wait() -> Tensor:
            with self._failing(name):
                work.wait()
            return received

        return wait

    def gather(self, name: str, chunk: Tensor) -> Tensor:
        """`(world · n, …)`: the equal chunks `(n, …)` of all ranks, in rank order."""
        out = torch.empty((self.world * chunk.shape[0], *chunk.shape[1:]), dtype=chunk.dtype, device=chunk.device)
        with self._failing(name):
            _all_gather(out, chunk.contiguous(), group=self.group)
        return out

    def gather_uneven(self, x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """The tensors `(lengths[r], …)` of all ranks, gathered at the largest length."""
        row = int(np.prod(x.shape[1:])) * x.element_size()
        packed = pack([[x]], x.device)
        padded = torch.nn.functional.pad(packed, (0, max(lengths) * row - packed.numel()))
        parts = self.gather("shards", padded).view(self.world, -1)
        shapes = [[((n, *x.shape[1:]), x.dtype)] for n in lengths]
        return [unpack(part, [shape])[0][0] for part, shape in zip(parts, shapes, strict=True)]

    def total(self, name: str, x: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each; x is overwritten."""
        with self._failing(name):
            dist.all_reduce(x, group=self.group)
        return x

    def numbers(self, name: str, values: Sequence[int], device: torch.device) -> NDArray[np.int64]:
        """`(world, m)`: m whole numbers of every rank."""
        local = torch.tensor(list(values), dtype=torch.int64, device=device)
        return self.gather(name, local).view(self.world, len(values)).cpu().numpy()

    @contextlib.contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DistributedError(
                f"rank {self.rank} of {self.world}: the exchange of {name} failed: a rank is lost, did not answer within the "
                f"group's time-out, or left the call. Restart all ranks from the last checkpoint. "
                f"({str(error).splitlines()[0][:300] if str(error) else type(error).__name__})"
            ) from error


def pack(messages: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """The bytes of all tensors of all messages, one after another."""
    # Strides are given: a tensor of one element is contiguous with any, but a view of another dtype needs 1.
    tensors = [x.contiguous() for message in messages for x in message if x.numel()]
    parts = [x.as_strided((x.numel(),), (1,)).view(torch.uint8) for x in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)


def unpack(data: Tensor, messages: Sequence[Sequence[Shape]]) -> list[list[Tensor]]:
    """The tensors of every message, from bytes that `pack` made of the same shapes."""
    out: list[list[Tensor]] = []
    first = 0
    for message in messages:
        tensors = []
        for shape, dtype in message:
            size = int(np.prod(shape)) * dtype.itemsize
            part = data[first : first + size]
            # A view of another dtype must begin at a multiple of its size.
            part = part.clone() if part.storage_offset() % dtype.itemsize else part
            tensors.append(part.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype, device=data.device))
            first += size
        out.append(tensors)
    return out
