"""`fl.KVCache`: a key-value cache that evicts a key once no query of a later token can see it.

Three layers: `EvictionRule` (until when each key is needed), `KeyStore` (pages and slots, one store per distinct rule), and
this class (the positions of a batch of texts, rollback, branches). Under a router there is one store that evicts nothing, and
`RouterState` holds block summaries beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farlight.decoding.checks import check_items, check_real, check_score, check_tokens, read_dtype
from farlight.decoding.last_use import eviction_rules
from farlight.decoding.native import NativeStores, is_native
from farlight.decoding.pages import Pages
from farlight.decoding.routed import RouterState
from farlight.decoding.store import KeyStore
from farlight.errors import ArgumentError
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.liveness import liveness_sizes
from farlight.patterns.positional import full
from farlight.routing.base import Router
from farlight.score.terms import Score

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of every position that a query from now on can see; all others are evicted.

    One decoding step is an `append` of the new tokens' keys and values, then a `decode` of their queries, or both in one call:

        cache.append(k, v);  out = fl.decode(q, cache)
        out = fl.step(q, k, v, cache)

    `out` has the rows that `fl.attention` gives for these queries over every key ever appended. After an append of tokens at
    positions t, t + 1, … the cache holds exactly the appended keys j with

        max { i : pattern allows (i, j) } >= t        (i < max_length, where that is given)

    unchanged, in `dtype`. A window with sinks takes constant memory; `causal()` evicts nothing. docs/decoding.md
    gives the set for each primitive, and the cases that keep more than needed. Eviction happens in `append` and `forget`.

    Args:
        pattern: which keys each query sees, causality included. Or a router: then nothing is evicted, since any key may be
            chosen later, and `TopBlocks` (causal=True) also keeps block summaries, so that a step reads these and the keys of
            the selected blocks only.
        max_length: the greatest length of the text; there are no queries at positions from there on. The pattern is then
            that of a text of this length, of which a prefix has been appended: negative positions count from its end, tables
            have one entry for each of its tokens. None: no end; the pattern must not depend on the length.
        heads: number of query heads. None: as many as the pattern's tables name, else as many as key heads. Required with
            grouped queries where the pattern differs between heads.
        dtype: element type of stored keys and values. None: that of the appended ones; torch.bfloat16 or another: rounded to
            it; "int8": codes of int8 with one float32 scale for each token, head and K or V, so that an element differs by at
            most max |row| / 254 from the appended one. Queries and outputs keep their own dtype.
        keep_back: keys are evicted that many tokens after their last use, so that `crop` can take that many tokens back.
        score, sinks: terms on the scores and attention sinks of every `decode` and `step` that names none itself; see
            `fl.decode`.

    Raises ArgumentError for another type of pattern, and PatternError when the pattern depends on the length of the text and
    `max_length` is not given, or does not fit.

    >>> import torch, farlight as fl
    >>> cache = fl.KVCache(fl.presets.streaming(4, 16))
    >>> for step in range(100):
    ...     q, k, v = torch.randn(3, 1, 2, 1, 8).unbind(0)
    ...     cache.append(k, v)
    ...     out = fl.decode(q, cache)
    >>> cache.length, cache.kept, cache.positions[0, 0, :6].tolist()
    (100, 20, [0, 1, 2, 3, 84, 85])
    """

    def __init__(
        self,
        pattern: Pattern | Router,
        *,
        max_length: int | None = None,
        heads: int | None = None,
        dtype: torch.dtype | str | None = None,
        keep_back: int = 0,
        score: Score | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if not isinstance(pattern, Pattern | Router):
            raise ArgumentError(
                f"KVCache: the pattern is {type(pattern).__name__}; pass a pattern such as fl.presets.streaming(4, 1024), or a "
                "router such as fl.routing.TopBlocks(8, causal=True)."
            )
        self._router_state = RouterState(pattern) if isinstance(pattern, Router) else None
        self.pattern: Pattern = full() if isinstance(pattern, Router) else pattern
        self.max_length = None if max_length is None else whole("KVCache: max_length", max_length, 1)
        self.heads = None if heads is None else whole("KVCache: heads", heads, 1)
        self.dtype, self.keep_back = read_dtype(dtype), whole("KVCache: keep_back", keep_back, 0)
        check_score("KVCache", score, sinks)
        self.score, self.sinks = score, sinks
        self._stores: list[KeyStore] = []
        self._native: NativeStores | None = None  # addresses of the stores, until one of them is reallocated
        self._sizes: Sizes
        # Tokens so far in each row. One row serves the batch until `real` makes its items differ.
        self._lengths = [0]
        # The last append: its first position in each row, its width in columns, and the columns of each row (None: all).
        self._last_start, self._last_width = [0], 0
        self._last_columns: list[NDArray[np.int64]] | None = None
        # Columns appended so far, padding included; and whether an append has begun and not ended.
        self._num_columns, self._appending = 0, False
        # (batch, key heads, head_dim)
        self._shape: tuple[int, int, int] | None = None
        self._dtype: torch.dtype
        self._device: torch.device
        if self.heads is not None or self.pattern._batch_and_heads()[1] == 1:
            # A pattern that fits no text raises here rather than at the first append.
            liveness_sizes(self.pattern, self.max_length, batch=self.pattern._batch_and_heads()[0], heads=self.heads or 1)

    # ---- contents --------------------------------------------------------------------------------------------------------
    @property
    def length(self) -> int:
        """Tokens appended so far, kept or evicted, in the longest text of the batch."""
        return max(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """`length` of each batch item; one number where all texts have the same tokens."""
        return list(self._lengths)

    @property
    def kept(self) -> int:
        """Keys held, in the key head and batch item that hold most."""
        self._rollback_unfinished()
        return max((store.kept for store in self._stores), default=0)

    @property
    def batch(self) -> int:
        """Batch items; 0 before the first append."""
        return 0 if self._shape is None else self._shape[0]

    @property
    def has_terms(self) -> bool:
        """Whether every `decode` has score terms or sinks."""
        return self.score is not None or self.sinks is not None

    @property
    def nbytes(self) -> int:
        """Bytes allocated now for keys, values, slot tables and block summaries."""
        return sum(store.nbytes for store in self._stores) + (0 if self._router_state is None else self._router_state.nbytes)

    @property
    def positions(self) -> Tensor:
        """`(B or 1, key heads, kept)` int64: the positions held, ascending, padded with -1."""
        self._rollback_unfinished()
        kv_heads = sum(len(store.rule.kv_heads) for store in self._stores)
        out = torch.full((len(self._lengths), kv_heads, self.kept), -1, device="cpu")
        for store in self._stores:
            for row in range(len(self._lengths)):
                count = store.slots.count[row]
                out[row, list(store.rule.kv_heads), :count] = torch.from_numpy(np.sort(store.slots.position[row, :count]))
        return out

    def __repr__(self) -> str:
        end = "" if self.max_length is None else f", max_length={self.max_length}"
        rule = self.pattern if self._router_state is None else self._router_state.router
        return f"KVCache({rule!r}{end}): {self.kept} of {self.length} keys, {self.nbytes:,} bytes"

    def _native_stores(self) -> NativeStores | None:
        """The native side of the stores; None where the native kernels do not serve them."""
        if self._native is None and self._stores and self._stores[0].pages.is_paged and self.batch:
            self._native = NativeStores(self)
        return self._native

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_native": None}

    # ---- updates ---------------------------------------------------------------------------------------------------------
    def append(self, k: Tensor, v: Tensor, *, real: Tensor | Sequence[Sequence[bool]] | None = None) -> None:
        """Append the keys and values `(B, H_kv, n, D)` of the next n tokens; evict keys that no query of these or later sees.

        real: `(B, n)` bool, for texts of different lengths: False where a batch item has no token in that column (padding, on
        either side). Each text has its own positions, 0, 1, … over its real tokens. The tensors are copied; no gradient is
        recorded.

        Atomic: interrupted by an exception (KeyboardInterrupt, out of memory), the cache rolls back at its next use to what it
        held before. Raises ArgumentError for tensors that do not fit the cache, for more than `max_length` tokens, and for
        `real` under a router.
        """
        self._rollback_unfinished()
        check_tokens(self, k, v)
        mask = None if real is None or not k.shape[0] else check_real(real, k)
        batch, n = k.shape[0], k.shape[2]
        if mask is not None and self._router_state is not None:
            raise ArgumentError(
                "KVCache.append: texts of different lengths cannot share a router's cache; use one cache for each."
            )
        if not self._stores:
            self._allocate(k, batch)
        if mask is not None and len(self._lengths) < batch:
            stores = [store.with_rows(batch) for store in self._stores]
            vars(self).update(_stores=stores, _native=None, _lengths=self._lengths * batch)
        if mask is None:
            new, columns = [n] * len(self._lengths), None
        else:
            columns = [np.flatnonzero(row) for row in mask.cpu().numpy()]
            new = [row.size for row in columns]
        if self.max_length is not None and max(a + b for a, b in zip(self._lengths, new, strict=True)) > self.max_length:
            raise ArgumentError(
                f"KVCache.append: {n} tokens after {self.length} make more than max_length = {self.max_length}; "
                "evicted keys cannot be restored, so start a new cache with a larger max_length."
            )
        # Tensors made in inference mode could not be written by a later call outside it.
        with torch.inference_mode(False), torch.no_grad():
            self._appending, self._native = True, None
            for store in self._stores:
                store.append(k, v, self._lengths, new, columns)
                store.rule.discard_before(min(self._lengths))
            if self._router_state is not None:
                self._router_state.append(self._stores[0], k.dtype)
        lengths = [a + b for a, b in zip(self._lengths, new, strict=True)]
        # One call, so that no signal handler runs between these assignments.
        vars(self).update(
            _last_start=self._lengths, _last_width=n, _last_columns=columns, _lengths=lengths,
            _num_columns=self._num_columns + n, _appending=False,
        )  # fmt: skip

    def _rollback_unfinished(self) -> None:
        """Undo an append that an exception interrupted."""
        if self._appending:
            self._truncate(self._lengths, self._num_columns)

    def _rollback_last(self) -> None:
        """Undo the last append. Keys that it evicted are not restored: no query at or after its first position sees them."""
        self._rollback_unfinished()
        self._truncate(self._last_start, self._num_columns - self._last_width)

    def _truncate(self, lengths: list[int], num_columns: int, stores: list[KeyStore] | None = None) -> None:
        """Drop tokens from position `lengths[row]` on. Exact for later queries: an append evicts only keys that none sees."""
        with torch.inference_mode(False), torch.no_grad():
            stores = [store.truncated(lengths) for store in self._stores] if stores is None else stores
            router_state = None if self._router_state is None else self._router_state.truncated(lengths[0])
        vars(self).update(
            _stores=stores, _router_state=router_state, _native=None, _lengths=lengths, _last_start=lengths,
            _last_width=0, _last_columns=None, _num_columns=num_columns, _appending=False,
        )  # fmt: skip

    def forget(self) -> None:
        """Evict the keys that only queries of the last append see; those queries cannot be decoded any more.

        The next `append` evicts them anyway. After a long prompt this frees its memory at once.
        """
        if self._stores and self._last_width:
            batch, kv_heads, dim = self._shape or (1, 1, 1)
            empty = torch.zeros(batch, kv_heads, 0, dim, dtype=self._dtype, device=self._device)
            self.append(empty, empty)

    def select(self, items: Tensor | Sequence[int]) -> None:
        """Replace the batch by these of its items, in this order; items may repeat. For beam search and finished texts.

        Raises ArgumentError for other values, before the first append, and where the pattern or the cache's score has a table
        per batch item.
        """
        self._rollback_unfinished()
        index = check_items(self, items)
        batch, kv_heads, dim = self._shape or (0, 0, 0)
        order = index.tolist()
        if order == list(range(batch)):
            return
        with torch.inference_mode(False), torch.no_grad():
            stores = [store.select(index.to(self._device)) for store in self._stores]
            router_state = self._router_state
            if router_state is not None:
                router_state = router_state.select(index.to(self._device))
        new: dict[str, Any] = {
            "_stores": stores,
            "_native": None,
            "_router_state": router_state,
            "_shape": (index.numel(), kv_heads, dim),
        }
        if len(self._lengths) > 1:
            new |= {name: [getattr(self, name)[i] for i in order] for name in ("_lengths", "_last_start")}
            new["_last_columns"] = None if self._last_columns is None else [self._last_columns[i] for i in order]
        sizes = Sizes(self._sizes.n_q, self._sizes.n_k, 0, index.numel(), self._sizes.heads)
        vars(self).update(new, _sizes=sizes)

    # ---- branches --------------------------------------------------------------------------------------------------------
    def crop(self, length: int) -> None:
        """Take tokens back: keep the first `length` of each text, as if no more had been appended.

        Exact where every key that a query from `length` on sees is still held: back to the beginning of the last append,
        `keep_back` tokens further, and anywhere for patterns that evict nothing that is needed. The queries of the tokens
        before are not decoded again. Raises ArgumentError where a key that is needed was evicted, and for a length out of
        range; the cache is then unchanged.
        """
        self._rollback_unfinished()
        length = whole("KVCache.crop: length", length, 0)
        if length > self.length:
            raise ArgumentError(f"KVCache.crop: length = {length}, but only {self.length} tokens were appended.")
        if length == self.length:
            return
        lengths = [min(length, present) for present in self._lengths]
        if any(store.missing(lengths) for store in self._stores):
            oldest = min(max(store.horizon for store in self._stores), self.length)
            raise ArgumentError(
                f"KVCache.crop: {self.length - length} tokens were to be taken back from {self.length}, but keys that queries "
                f"from position {length} on see are evicted; it can go back to {oldest}. Make the cache with "
                f"keep_back={self.length - length + self._last_width} to go further back."
            )
        with torch.inference_mode(False), torch.no_grad():
            stores = [store.cropped(lengths) for store in self._stores]
        self._truncate(lengths, self._num_columns - (self.length - length), stores)

    def fork(self) -> KVCache:
        """A cache of the same keys that goes on by itself: for beams, drafts, and texts with a common beginning.

        Copy on write by pages of 64 slots: both share the memory of a page until one of them writes to it. `nbytes` counts
        shared pages in each. Where the native kernels do not run, the first write copies the whole store.
        """
        self._rollback_unfinished()
        new = copy.copy(self)
        state = None if self._router_state is None else self._router_state.fork()
        vars(new).update(_stores=[store.fork() for store in self._stores], _router_state=state, _native=None)
        self._native = None
        return new

    def _allocate(self, k: Tensor, batch: int) -> None:
        """Make empty stores for a batch like k `(B, H_kv, n, D)`. Raises ArgumentError and PatternError."""
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
        rules = eviction_rules(self.pattern, sizes, kv_heads, self.max_length is None)
        shape, stored = (batch, kv_heads, k.shape[3]), k.dtype if self.dtype is None else self.dtype
        paged = is_native(k.device, k.dtype, stored, k.shape[3])
        stores = [
            KeyStore(rule, Pages((batch, len(rule.kv_heads), k.shape[3]), stored, k.device, paged), rows, self.keep_back)
            for rule in rules
        ]
        vars(self).update(
            _sizes=sizes, _lengths=[0] * rows, _stores=stores, _shape=shape, _dtype=k.dtype, _device=k.device
        )  # fmt: skip
