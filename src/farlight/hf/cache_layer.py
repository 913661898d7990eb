"""One layer of a `SparseCache`: what it takes in, and how it answers the attention function."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from farlight.decoding.cache import KVCache
from farlight.decoding.decode import masked_decode
from farlight.errors import UnsupportedError
from farlight.hf.attention_function import Chosen
from farlight.hf.cached_tensors import HandedOut
from farlight.hf.interface import KEY
from farlight.hf.keyword_arguments import sinks_merged
from farlight.hf.lazy_mask import ModelMask
from farlight.hf.masks import tensor_mask
from farlight.patterns import causal, full, global_tokens, offsets, padding, seen_by_all, sees_all, strided, window
from farlight.patterns.algebra import Intersection, looks_back
from farlight.patterns.expression import Pattern
from farlight.routing import Router

__all__ = ["SparseLayer", "rule_of"]


def conjuncts(pattern: Pattern) -> list[Pattern]:
    """The patterns that must all allow a pair."""
    return [part for both in pattern.parts for part in conjuncts(both)] if isinstance(pattern, Intersection) else [pattern]


def rule_of(layer: Any) -> Pattern | None:
    """What the model itself allows, as far as its configuration says it, from the layer of the cache that transformers makes.

    None for a layer that keeps no keys.
    """
    if type(layer) is getattr(cache_utils, "DummyLayer", None):
        return None
    if type(layer) is DynamicSlidingWindowLayer:
        return window(int(layer.sliding_window) - 1, 0)
    if type(layer) is not DynamicLayer:
        raise UnsupportedError(
            f"SparseCache: a layer of this model keeps its past in a {type(layer).__name__}, which holds more than "
            "keys and values; use the cache that transformers makes for it."
        )
    return causal()


class SparseLayer(CacheLayerMixin):
    """One layer's part of a `SparseCache`: new keys wait between `update` and the attention function that asks about them."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, config: Any, own: Pattern, pattern: Chosen, max_length: int | None, heads: int, number: int) -> None:
        super().__init__()
        self.config, self.pattern, self.max_length, self.heads = config, pattern, max_length, heads
        self.own, self.number, self.updates = own, number, 0
        self.reset()

    def reset(self) -> None:
        rule = self.own if self.pattern is None else self.pattern & self.own
        self.cache = KVCache(rule, max_length=self.max_length, heads=self.heads)
        self.waiting, self.taken, self.is_initialized = False, -1, False

    @property
    def seen(self) -> int:
        """Columns taken in so far, padding included."""
        return self.cache._num_columns

    def take_back(self, before: int) -> None:
        """Go back to the length before the last step."""
        self.waiting = False
        if not before:
            self.reset()
        elif self.seen > before:
            self.cache._rollback_last()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.config._attn_implementation != KEY:
            raise UnsupportedError(
                "SparseCache drops keys, and the attention of this model (attn_implementation="
                f"{self.config._attn_implementation!r}) does not ask which are left; call fl.hf.register() and "
                "model.set_attn_implementation('farlight') first."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.updates += 1
        self.waiting = True
        return HandedOut.of(key_states, self, self.updates), HandedOut.of(value_states, self, self.updates)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: HandedOut,
        value: HandedOut,
        attention_mask: ModelMask | Tensor | None,
        chosen: Chosen,
        scaling: float | None,
        dropout: float,
        *,
        sinks: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """What the attention function of transformers returns, `(B, N, H, D)`, for the newest tokens."""
        name = type(module).__name__
        self.waiting = False
        if chosen is not None and chosen != self.pattern:
            raise UnsupportedError(
                f"{name} runs under {chosen!r}, but its cache was made for {self.pattern!r}, and has dropped what that does "
                "not need; make the cache with the model's own pattern."
            )
        if dropout:
            raise UnsupportedError(
                f"{name} asks for dropout = {dropout} while it reads a SparseCache; call model.eval() first."
            )
        if indices is not None:
            raise UnsupportedError(f"{name} chooses keys by itself, among all of them; use the cache that transformers makes.")
        total = self.seen + (0 if self.taken == self.updates else key.shape[2])
        own = self._mask(name, query, total, attention_mask, getattr(module, "is_causal", True))
        also = self._beside_the_rule(name, own, query, total)
        new = None
        if own.key_real is not None and self._counts_by_text(name, own.key_real):
            new = own.key_real.expand(query.shape[0], -1)[:, total - key.shape[2] :]
        # What the rule of the cache says already need not be asked again.
        if new is not None and also == padding(own.key_real):
            also = None
        elif also is not None and (new is not None or isinstance(self.pattern, Router)):
            raise UnsupportedError(
                f"{name} masks keys by {own.pattern!r} beside {self.pattern!r}, which counts the tokens of each text or reads "
                "their content; generate from texts of one length, or with the cache that transformers makes."
            )
        self._check_padding(name, total - key.shape[2], own.key_real if new is not None else None, query.shape[0])
        # A layer that attends twice over the same keys, or over those of another layer, finds them taken in.
        if self.taken != self.updates:
            self.cache.append(key.plain, value.plain, real=new)
            self.taken = self.updates
        out, lse = masked_decode(query, self.cache, scaling, sinks is not None, also)
        if sinks is not None and lse is not None:
            out = sinks_merged(module, out, lse, sinks)
        return out.transpose(1, 2).contiguous()

    def _check_padding(self, name: str, before: int, real: Tensor | None, batch: int) -> None:
        """Raise where a mask takes other columns for padding than it did when their tokens came: those were not kept."""
        if self.taken == self.updates:
            return
        taken = [before] * batch if real is None else real[:, :before].sum(1).expand(batch).tolist()
        held = self.cache.lengths
        if taken != (held * batch if len(held) == 1 else held):
            raise UnsupportedError(
                f"{name}: the attention_mask takes other tokens for padding than in the passes before, which kept {held} "
                "tokens of the texts; pass the same mask, made longer, at every pass."
            )

    def _beside_the_rule(self, name: str, own: ModelMask, query: Tensor, total: int) -> Pattern | None:
        """What the model's mask says beside the rule of the cache: None where that says it all.

        The rule may not say more: pairs that the mask allows would be lost. Before the first token is taken in, a sliding
        window that the configuration names and the mask does not is given up.
        """
        parts, n_q = conjuncts(own.pattern), query.shape[2]
        if parts == [full()] and n_q == 1 and self.own == causal():
            return None
        if self.own not in parts and causal() in parts and not self.seen:
            self.own = causal()
            self.reset()
        if self.own in parts or (self.own == causal() and isinstance(self.pattern, Pattern) and looks_back(self.pattern)):
            rest = [part for part in parts if part not in (self.own, full())]
            return functools.reduce(operator.and_, rest) if rest else None
        held = self.own.dense(n_q, total, q_offset=total - n_q, device=query.device)
        mask = own.pattern.dense(n_q, total, batch=query.shape[0], q_offset=own.q_offset, device=query.device)
        if bool((mask & ~held).any()):
            raise UnsupportedError(
                f"{name}: the model's mask lets queries see keys that {self.own!r}, by which this cache drops keys, does not; "
                "use the cache that transformers makes."
            )
        return own.pattern

    def _mask(self, name: str, query: Tensor, total: int, mask: Any, is_causal: bool) -> ModelMask:
        """What the model itself allows, of the `total` tokens so far, the last of which are the queries."""
        offset = total - query.shape[2]
        found = getattr(mask, "own", mask)
        if isinstance(found, Tensor):
            found = tensor_mask(found, query.shape[2], total)
        elif found is None:
            if not is_causal:
                raise UnsupportedError(f"{name} is not causal; a SparseCache serves generation only.")
            found = ModelMask(causal(), offset)
        # Where a mask is the same for all queries, models do not say where those stand.
        moves = any(not isinstance(part, full | padding) for part in conjuncts(found.pattern))
        if (moves and found.q_offset != offset) or found.n_k not in (None, total):
            raise UnsupportedError(
                f"{name}: the model's mask is that of queries from position {found.q_offset} among {found.n_k} keys, but this "
                f"cache holds {total} with {query.shape[2]} queries at their end. Pass the attention_mask of the whole text."
            )
        assert isinstance(found, ModelMask)
        return found

    def _counts_by_text(self, name: str, real: Tensor) -> bool:
        """Whether positions are those in each text of a padded batch: so it is where the pattern names positions."""
        named, distant = global_tokens | sees_all | seen_by_all, full | causal | window | offsets
        atoms = list(self.pattern.atoms()) if isinstance(self.pattern, Pattern) else []
        if not any(isinstance(atom, named) for atom in atoms):
            return False
        others = [a for a in atoms if not isinstance(a, named | distant) and not (isinstance(a, strided) and a.phase is None)]
        if others or bool((real[:, :-1] & ~real[:, 1:]).any()):
            what = f"{others[0]!r} counts places in the rows" if others else "the padding does not stand before the texts"
            raise UnsupportedError(
                f"{name}: in a padded batch the positions that {self.pattern!r} names count the tokens of each text, but "
                f"{what}; generate from texts of one length, or pad on the left and give distances and named positions only."
            )
        return True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self.cache.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.cache.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            batch = torch.arange(self.cache.batch)
            self.cache.select(batch.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UnsupportedError(
                f"SparseCache: {abs(tokens_to_remove)} tokens cannot be taken back, since keys that only they made unneeded "
                "are gone; generate without an assistant, or with the cache that transformers makes."
            )

    def offload(self) -> None:
        raise UnsupportedError("SparseCache stays on the model's device; make it without offloading.")
