"""`fl.KVCache`: keys and values of a text that grows, without those that no later token can see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from farlight.attention import even_widths, refuse_layouts
from farlight.decoding.last_use import rules
from farlight.decoding.routed import Routed
from farlight.decoding.store import Store
from farlight.errors import ArgumentError, UnsupportedError, show
from farlight.patterns.arguments import refuse_tracing, whole
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.liveness import liveness_sizes
from farlight.patterns.positional import full
from farlight.routing.base import Router

__all__ = ["KVCache"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class KVCache:
    """The keys that some query from now on may see, and their values; the others are dropped.

    Append the keys and values of the new tokens, then ask `fl.decode` with their queries:

        cache.append(k, v);  out = fl.decode(q, cache)

    which gives the rows that `fl.attention` gives for these queries over every key ever appended. After `append` of tokens at
    positions t, t + 1, … the cache holds exactly the keys j that have been appended with

        some position i >= t  sees  j        (i < max_length, where that is given)

    in float for float as they came: a window and sinks take constant memory; `causal()` keeps everything. How this reads for
    each primitive, and where more is kept than needed, is in docs/decoding.md.

    Args:
        pattern: who may look at whom; the whole of it, causality included. Or a router: then every key is kept, since any may
            be chosen, and `TopBlocks` (causal=True) also keeps summaries of the blocks, so that a step reads them and the
            chosen blocks only.
        max_length: the length that the text will have at most; positions from there on are no queries. The pattern is then
            that of a text of this length, of which the first part is there: negative positions count from its end, tables have
            an entry for each of its tokens. None: no end; the pattern must not depend on the length.
        heads: number of query heads; None: as many as the pattern names, else as many as heads of keys. Needed with grouped
            queries where the pattern differs from head to head.

    Raises PatternError when the pattern depends on the length of the text and `max_length` is not given, or does not fit.

    >>> import torch, farlight as fl
    >>> cache = fl.KVCache(fl.presets.streaming(4, 16))
    >>> for step in range(100):
    ...     q, k, v = torch.randn(3, 1, 2, 1, 8).unbind(0)
    ...     cache.append(k, v)
    ...     out = fl.decode(q, cache)
    >>> cache.length, cache.kept, cache.positions[0, 0, :6].tolist()
    (100, 20, [0, 1, 2, 3, 84, 85])
    """

    def __init__(self, pattern: Pattern | Router, *, max_length: int | None = None, heads: int | None = None) -> None:
        if not isinstance(pattern, Pattern | Router):
            raise ArgumentError(
                f"KVCache: the pattern is {type(pattern).__name__}; pass a pattern such as fl.presets.streaming(4, 1024), or a "
                "router such as fl.routing.TopBlocks(8, causal=True)."
            )
        self._routed = Routed(pattern) if isinstance(pattern, Router) else None
        self.pattern: Pattern = full() if isinstance(pattern, Router) else pattern
        self.max_length = None if max_length is None else whole("KVCache: max_length", max_length, 1)
        self.heads = None if heads is None else whole("KVCache: heads", heads, 1)
        self._stores: list[Store] = []
        self._sizes: Sizes
        self._lengths = [0]
        # Of the last append: where its tokens begin in each row, how many there were, and which columns were real.
        self._start, self._new, self._width = [0], [0], 0
        self._columns: list[NDArray[np.int64]] | None = None
        # Columns appended so far, tokens or not; and whether an append was begun and not ended.
        self._taken, self._appending = 0, False
        self._shape: tuple[int, int, int] | None = None
        self._kind: tuple[torch.dtype, torch.device]
        if self.heads is not None or self.pattern._batch_and_heads()[1] == 1:
            # What cannot be right whatever comes is said at once.
            liveness_sizes(self.pattern, self.max_length, batch=self.pattern._batch_and_heads()[0], heads=self.heads or 1)

    # ---- what it holds ---------------------------------------------------------------------------------------------------
    @property
    def length(self) -> int:
        """Tokens appended so far, kept or not; of the longest text of the batch."""
        return max(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """`length` for each batch item; one number where all are equal."""
        return list(self._lengths)

    @property
    def kept(self) -> int:
        """Keys kept: in the head and batch item that keep most."""
        self._settle()
        return max((store.kept for store in self._stores), default=0)

    @property
    def batch(self) -> int:
        """Batch items; 0 before the first append."""
        return 0 if self._shape is None else self._shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and tables held now."""
        return sum(store.nbytes for store in self._stores) + (0 if self._routed is None else self._routed.nbytes)

    @property
    def positions(self) -> Tensor:
        """`(B or 1, kv heads, kept)` int64: the positions kept, ascending; -1 at the end of shorter rows."""
        self._settle()
        kv_heads = sum(len(store.rule.kv_heads) for store in self._stores)
        out = torch.full((len(self._lengths), kv_heads, self.kept), -1, device="cpu")
        for store in self._stores:
            for row in range(len(self._lengths)):
                count = store.slots.count[row]
                found = torch.from_numpy(np.sort(store.slots.position[row, :count]))
                out[row, list(store.rule.kv_heads), :count] = found
        return out

    def __repr__(self) -> str:
        end = "" if self.max_length is None else f", max_length={self.max_length}"
        what = self.pattern if self._routed is None else self._routed.router
        return f"KVCache({what!r}{end}): {self.kept} of {self.length} keys, {self.nbytes:,} bytes"

    # ---- growing ---------------------------------------------------------------------------------------------------------
    def append(self, k: Tensor, v: Tensor, *, real: Tensor | Sequence[Sequence[bool]] | None = None) -> None:
        """Take in the keys and values `(B, H_kv, n, D)` of the next n tokens; drop what no query of these or later ones sees.

        `real` `(B, n)` bool, for texts of different lengths: False where a batch item has no token in that column (padding, on
        either side). Each text has its own positions, from 0 without gaps. The tensors are copied; no gradient is recorded.

        All or nothing: where an exception (Ctrl-C, too little memory) ends it early, the cache holds what it held before, and
        goes on from there.
        """
        self._settle()
        self._check(k, v)
        mask = None if real is None or not k.shape[0] else self._read_real(real, k)
        batch, n = k.shape[0], k.shape[2]
        if mask is not None and self._routed is not None:
            raise ArgumentError(
                "KVCache.append: texts of different lengths cannot share a router's cache; use one cache for each."
            )
        if not self._stores:
            self._open(k, batch)
        if mask is not None and len(self._lengths) < batch:
            split = [store.split(batch) for store in self._stores]
            vars(self).update(_stores=split, _lengths=self._lengths * batch)
        if mask is None:
            new, columns = [n] * len(self._lengths), None
        else:
            columns = [np.flatnonzero(row) for row in mask.cpu().numpy()]
            new = [row.size for row in columns]
        if self.max_length is not None and max(a + b for a, b in zip(self._lengths, new, strict=True)) > self.max_length:
            raise ArgumentError(
                f"KVCache.append: {n} tokens after {self.length} make more than max_length = {self.max_length}; "
                "what was dropped cannot be brought back, so begin again with a larger max_length."
            )
        # What is kept must stay writable when the next call comes from outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._appending = True
            for store in self._stores:
                store.append(k, v, self._lengths, new, columns)
                store.rule.drop_before(min(self._lengths))
            if self._routed is not None:
                self._routed.append(self._stores[0].k[:, :, : self._lengths[0] + n])
        lengths = [a + b for a, b in zip(self._lengths, new, strict=True)]
        # In one call, which no signal divides.
        vars(self).update(
            _start=self._lengths, _new=new, _width=n, _columns=columns, _lengths=lengths, _taken=self._taken + n,
            _appending=False,
        )  # fmt: skip

    def _settle(self) -> None:
        """Take back what an append that did not end had done."""
        if self._appending:
            self._cut(self._lengths, self._taken)

    def _take_back(self) -> None:
        """Take the tokens of the last append back, but for what `forget` has let go. What only they made unneeded is gone."""
        self._settle()
        self._cut(self._start, self._taken - self._width)

    def _cut(self, lengths: list[int], taken: int) -> None:
        """Go back to these `lengths`: exact for queries from there on, since an append drops only what none of those sees."""
        with torch.inference_mode(False), torch.no_grad():
            stores = [store.cut(lengths) for store in self._stores]
            routed = None if self._routed is None else self._routed.cut(lengths[0])
        vars(self).update(
            _stores=stores, _routed=routed, _lengths=lengths, _start=lengths, _new=[0] * len(lengths), _width=0, _columns=None,
            _taken=taken, _appending=False,
        )  # fmt: skip

    def forget(self) -> None:
        """The queries of the tokens appended last have been answered: drop what only they could see.

        The next `append` does it anyway; after a long prompt this gives its memory back at once.
        """
        if self._stores and self._width:
            batch, kv_heads, dim = self._shape or (1, 1, 1)
            nothing = self._stores[0].k.new_zeros(batch, kv_heads, 0, dim)
            self.append(nothing, nothing)

    def select(self, items: Tensor | Sequence[int]) -> None:
        """Keep these batch items, in this order, repeated or not: beam search, or a batch that loses finished texts."""
        self._settle()
        index = torch.as_tensor(items, device="cpu")
        if index.dim() != 1 or index.dtype.is_floating_point or index.dtype == torch.bool or not index.numel():
            raise ArgumentError(f"KVCache.select: {show(items)} is not a list of batch items; pass whole numbers.")
        if self._shape is None:
            raise ArgumentError("KVCache.select: nothing was appended yet, so there are no batch items to choose from.")
        batch, kv_heads, dim = self._shape
        if int(index.min()) < 0 or int(index.max()) >= batch:
            raise ArgumentError(f"KVCache.select: {show(index)} for a batch of {batch}; use 0 … {batch - 1}.")
        if self.pattern.varies_over_batch and index.tolist() != list(range(batch)):
            raise ArgumentError(
                "KVCache.select: the pattern has tables of its own for each batch item, which cannot follow; use one pattern "
                "for all, and `real` for texts of different lengths."
            )
        order = index.tolist()
        with torch.inference_mode(False), torch.no_grad():
            stores = [store.select(index.to(store.k.device)) for store in self._stores]
            routed = None if self._routed is None else self._routed.select(index.to(self._stores[0].k.device))
        new: dict[str, Any] = {"_stores": stores, "_routed": routed, "_shape": (index.numel(), kv_heads, dim)}
        if len(self._lengths) > 1:
            new |= {name: [getattr(self, name)[i] for i in order] for name in ("_lengths", "_start", "_new")}
            new["_columns"] = None if self._columns is None else [self._columns[i] for i in order]
        sizes = Sizes(self._sizes.n_q, self._sizes.n_k, 0, index.numel(), self._sizes.heads)
        vars(self).update(new, _sizes=sizes)

    def _open(self, k: Tensor, batch: int) -> None:
        kv_heads = k.shape[1]
        heads = kv_heads if self.heads is None else self.heads
        if self.heads is None and self.pattern._batch_and_heads()[1] > 1:
            heads = self.pattern._batch_and_heads()[1]
        if heads % kv_heads:
            raise ArgumentError(
                f"KVCache.append: k has {kv_heads} heads, but heads = {heads}: the second must be a multiple of the first."
            )
        sizes = liveness_sizes(self.pattern, self.max_length, batch=batch, heads=heads)
        rows = batch if self.pattern.varies_over_batch else 1
        stores = [Store(rule, k, rows) for rule in rules(self.pattern, sizes, kv_heads, self.max_length is None)]
        shape = (batch, kv_heads, k.shape[3])
        vars(self).update(_sizes=sizes, _lengths=[0] * rows, _stores=stores, _shape=shape, _kind=(k.dtype, k.device))

    def _check(self, k: Tensor, v: Tensor) -> None:
        refuse_layouts(k=k, v=v)
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in _DTYPES:
                found = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
                raise ArgumentError(
                    f"KVCache.append: {name} is {found}; (B, H_kv, n, D) in float16, bfloat16, float32 or float64 is needed."
                )
        if k.shape != v.shape or k.dtype != v.dtype or k.device != v.device:
            raise ArgumentError(
                f"KVCache.append: k is {tuple(k.shape)} of {k.dtype} on {k.device}, v is {tuple(v.shape)} of {v.dtype} on "
                f"{v.device}; they must agree"
                + (f": {even_widths(k.shape[3], v.shape[3])}" if k.shape[3] != v.shape[3] else ".")
            )
        refuse_gradients("KVCache.append", k, v)
        if self._shape is None:
            if not (k.shape[1] and k.shape[3]):
                raise ArgumentError(f"KVCache.append: k is {tuple(k.shape)}: heads and head_dim must be at least 1.")
            return
        if (k.shape[0], k.shape[1], k.shape[3]) != self._shape:
            b, h, d = self._shape
            raise ArgumentError(
                f"KVCache.append: k is {tuple(k.shape)}, but the cache holds ({b}, {h}, …, {d}); use a new cache."
            )
        if (k.dtype, k.device) != self._kind:
            raise ArgumentError(
                f"KVCache.append: k is {k.dtype} on {k.device}, but the cache holds {self._kind[0]} on {self._kind[1]}; "
                "cast or move it, or use a new cache."
            )

    def _read_real(self, real: Any, k: Tensor) -> Tensor:
        mask = torch.as_tensor(real, device="cpu")
        wanted = (k.shape[0], k.shape[2])
        if mask.dtype != torch.bool or tuple(mask.shape) != wanted:
            raise ArgumentError(
                f"KVCache.append: real is {tuple(mask.shape)} of {mask.dtype}; bool {wanted}, True where there is a token, "
                "is needed."
            )
        return mask


def refuse_gradients(what: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ArgumentError(
            f"{what}: an input requires grad, but decoding records no gradients, since dropped keys could not get theirs. "
            "Use torch.no_grad() or .detach(); for training use fl.attention."
        )
    if forward_ad._current_level >= 0:
        raise UnsupportedError(
            f"{what}: called inside a forward-mode derivative (jvp, jacfwd, linearize, dual numbers), but decoding records no "
            "derivatives. Use fl.attention(…, backend='reference')."
        )
    refuse_tracing(what)
