"""The native side of a cache: one `farlight._cpu.Decoder` with the addresses of a cache's pages and slot tables.

It is rebuilt whenever one of them is reallocated, and serves an append of one token and the attention of a few queries in one
call each, for all stores, heads and batch items.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from farlight.decoding.slots import IntArray
from farlight.decoding.store import KeyStore
from farlight.decoding.terms import DecodeTerms
from farlight.inputs import read_scale
from farlight.kernels.checks import MOST_DIMS, addressable
from farlight.kernels.cpu import unavailable
from farlight.kernels.cpu.native import module

if TYPE_CHECKING:
    from farlight.decoding.cache import KVCache

__all__ = ["NativeStores", "is_native", "readable"]

# (address, batch stride, head stride, row stride)
Place = tuple[int, int, int, int]
# What `Decoder.step` returns (csrc/decoder.h).
_APPENDED, _ATTENDED = 1, 2
# enum KeyType in csrc/decode.h
_KEY_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def is_native(device: torch.device, tokens: torch.dtype, stored: torch.dtype, dim: int) -> bool:
    """Whether the native kernels decode queries and tokens of one dtype over keys stored in another."""
    types = tokens in _KEY_TYPES and stored in _KEY_TYPES
    return device.type == "cpu" and types and tokens != torch.int8 and dim <= MOST_DIMS and unavailable() is None


@functools.cache
def _reader() -> Any:
    """Reads tensors without their Python attributes; None with torch before 2.10, or of a DLPack that is not known here."""
    if unavailable() is not None or not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return None
    try:
        return module().TensorReader(Tensor)
    except ValueError:
        return None


class NativeStores:
    """A `Decoder` over the stores of a cache, and what the fast path of a step compares its arguments with."""

    def __init__(self, cache: KVCache) -> None:
        assert cache._shape is not None
        batch, kv_heads, dim = cache._shape
        self.token_shape = (batch, kv_heads, 1, dim)
        # The number of query heads, where it matters.
        self.heads = cache._sizes.heads if cache.pattern.varies_over_heads else None
        self.dtype, self.type = cache._dtype, _KEY_TYPES[cache._dtype]
        # An output of the last step, and the scale that None means.
        self.like: Tensor | None = None
        self.scale = read_scale(None, dim)
        self.reader = _reader()
        self.decoder = module().Decoder(batch, kv_heads, dim, _KEY_TYPES[cache._stores[0].pages.dtype], cache.keep_back)
        self._owned: list[object] = []  # what the addresses point into
        for store in cache._stores:
            self._add(store)
        self.router_state = cache._router_state
        self.serves_steps = True  # False: the router chooses in ways that the kernels have not
        if self.router_state is not None:
            router = self.router_state.native_arguments(dim)
            self.serves_steps = router is not None
            if router is not None:
                self.decoder.set_router(*router)

    def _add(self, store: KeyStore) -> None:
        slots, rule, pages = store.slots, store.rule, store.pages
        tables = (slots.position, slots.last_use, slots.gapless, slots.state)
        last_use, gapless, start, stop = rule.tables()
        program = rule.program
        self._owned += [pages.pages, tables, last_use, gapless]
        self.decoder.add_store(
            [number for page in pages.pages for number in page.addresses()],
            pages.shift,
            rule.kv_heads,
            slots.rows,
            slots.capacity,
            [table.ctypes.data for table in tables],
            [last_use.ctypes.data, gapless.ctypes.data, start, stop],
            () if program is None else program.code,
            0 if program is None else program.depth,
        )

    def fits_token(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether these are one token's tensors for this cache, in host memory with contiguous rows; `self.like` is then
        that of q."""
        grad = torch.is_grad_enabled()
        for x in (q, k, v):
            if type(x) is not Tensor or x.dtype is not self.dtype or not x.is_cpu or x.layout is not torch.strided:
                return False
            if x.dim() != 4 or x.is_neg() or (grad and x.requires_grad):
                return False
            if x.stride(3) != 1 and x.shape[3] != 1:
                return False
        shape, kv_heads = q.shape, self.token_shape[1]
        batch, _, one, dim = self.token_shape
        if not k.shape == v.shape == self.token_shape or (shape[0], shape[2], shape[3]) != (batch, one, dim):
            return False
        if not shape[1] or shape[1] % kv_heads or (self.heads is not None and shape[1] != self.heads):
            return False
        if self.like is None or self.like.shape != shape:
            self.like = torch.empty(shape, dtype=self.dtype, device="cpu")
        return all(addressable(x, name) is x for name, x in (("q", q), ("k", k), ("v", v)))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, position: int, scale: float, return_lse: bool, terms: DecodeTerms | None = None
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """Append one token and attend, in one call; (out, lse or None).

        None, and nothing changed, where the tensors do not fit or the append needs the general path; (None, None) where only
        the attention does.
        """
        by_address = self.reader is None or self.like is None or terms is not None
        if by_address and not self.fits_token(q, k, v):
            return None
        assert self.like is not None
        out, lse, address = self._outputs(self.like, return_lse)
        cap, addresses = (0.0, ()) if terms is None else terms.native
        results, threads = (out.data_ptr(), address), torch.get_num_threads()
        of_call = self.type, self.like.shape[1], position, scale, results, threads, cap, addresses
        if by_address:
            places = _strided_address(q), _strided_address(k), _strided_address(v)
            done = self.decoder.step_by_address(*places, *of_call)
        else:
            done = self.decoder.step(self.reader, q, k, v, torch.is_grad_enabled(), *of_call)
        return (out, lse) if done == _ATTENDED else (None, None) if done == _APPENDED else None

    def attend_routed(
        self, q: Tensor, first: int, scale: float, return_lse: bool, terms: DecodeTerms | None = None
    ) -> tuple[Tensor, Tensor | None] | None:
        """(out, lse or None) of the newest queries, from position `first` on, over what the router chooses; None where the
        kernels cannot choose."""
        return self._attend(self.decoder.attend_routed, q, first, scale, return_lse, terms) if self.serves_steps else None

    def attend(
        self, q: Tensor, positions: int | IntArray, scale: float, return_lse: bool, terms: DecodeTerms | None = None
    ) -> tuple[Tensor, Tensor | None] | None:
        """(out, lse or None) of q `(B, H, n, D)` by the stores' visibility programs; None where a store has none.

        positions: that of the first query of every batch item, or `(rows, n)`, -1 = no token.
        """
        return self._attend(self.decoder.attend, q, positions, scale, return_lse, terms)

    def attend_masked(
        self,
        q: Tensor,
        positions: IntArray,
        masks: Sequence[Tensor],
        scale: float,
        return_lse: bool,
        terms: DecodeTerms | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, lse or None) of q at `positions` under one mask for each store: `(B or 1, heads of the store or 1, n, slots)`
        bool."""
        places = []
        masks = [mask.contiguous() for mask in masks]
        for mask in masks:
            steps = (0 if n == 1 else stride for n, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True))
            places.append((mask.data_ptr(), *steps))
        result = self._attend(self.decoder.attend_masked, q, positions, scale, return_lse, terms, places)
        assert result is not None
        return result

    def _attend(
        self,
        function: Callable[..., bool],
        q: Tensor,
        positions: int | IntArray,
        scale: float,
        return_lse: bool,
        terms: DecodeTerms | None,
        *more: object,
    ) -> tuple[Tensor, Tensor | None] | None:
        """(out, lse or None) that a function of the decoder writes; None where it returns False."""
        out, lse, address = self._outputs(q, return_lse)
        if isinstance(positions, int):
            where: tuple[int, int, int] = (0, 1, positions)
        else:
            positions = np.ascontiguousarray(positions)
            where = (positions.ctypes.data, positions.shape[0], 0)
        cap, addresses = (0.0, ()) if terms is None else terms.native
        done = function(
            _strided_address(q), self.type, q.shape[1:3], where, scale, (out.data_ptr(), address), torch.get_num_threads(), cap,
            addresses, *more,
        )  # fmt: skip
        return (out, lse) if done else None

    def _outputs(self, q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor | None, int]:
        """Empty out and lse, and the address of the lse or 0."""
        # `empty_like` is the cheapest way to allocate, where it gives contiguous rows.
        out = torch.empty_like(q) if q.is_contiguous() else torch.empty(q.shape, dtype=q.dtype, device="cpu")
        if not return_lse:
            return out, None, 0
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device="cpu")
        return out, lse, lse.data_ptr()


def readable(x: Tensor, name: str) -> Tensor:
    """x, or a copy whose memory holds its values with contiguous rows."""
    x = addressable(x, name)
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _strided_address(x: Tensor) -> Place:
    """The place of a `readable` tensor."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row
