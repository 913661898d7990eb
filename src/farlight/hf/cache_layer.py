"""One layer of a `SparseCache`: a `farlight.KVCache` behind the interface of transformers' cache layers.

transformers calls `update` with a layer's new keys and values, then the attention function with what `update` returned. The
keys are appended to the `KVCache` only in `attend`, when the model's mask is known: padding columns are then left out, and the
mask is compared with the rule by which the cache drops keys. `update` itself only tags the tensors (`CachedTensor`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from farlight.decoding.cache import KVCache
from farlight.decoding.decode import masked_decode
from farlight.decoding.step import step
from farlight.decoding.terms import read_terms
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.cached_tensors import CachedTensor
from farlight.hf.keyword_arguments import check_sinks
from farlight.hf.lazy_mask import LazyMask, ModelMask
from farlight.hf.masks import tensor_mask
from farlight.hf.setting import ATTN_IMPLEMENTATION, LayerPattern
from farlight.patterns import causal, full, global_tokens, offsets, padding, seen_by_all, sees_all, strided, window
from farlight.patterns.algebra import Intersection, looks_back
from farlight.patterns.expression import Pattern
from farlight.routing import Router
from farlight.score import Score
from farlight.score.terms import KeyBias

__all__ = ["SparseLayer", "model_rule_of"]


def conjuncts(pattern: Pattern) -> list[Pattern]:
    """The patterns of a nested intersection: a pair is allowed when all of them allow it."""
    return [part for both in pattern.parts for part in conjuncts(both)] if isinstance(pattern, Intersection) else [pattern]


def model_rule_of(layer: Any) -> Pattern | None:
    """The mask of a layer as far as the configuration says it, from the cache layer that transformers makes for it.

    Causality or a causal sliding window; None for a layer that keeps no keys. Raises UnsupportedError for a layer that keeps
    something else than keys and values.
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
    """The keys and values of one layer, without those that no later token can see.

    Args:
        config: the model's configuration; its attention implementation is checked at each update.
        model_rule: the layer's own mask, see `model_rule_of`.
        pattern: what the layer runs under beside it; None for nothing.
        number: the layer's number.
        options: `heads`, `max_length`, `dtype` and `keep_back` of `fl.KVCache`.

    Attributes:
        cache: the `KVCache` under `pattern & model_rule`.
        num_updates: how often `update` was called; identifies the tensors of the latest one.
        appended_update: number of the update whose keys were appended last; -1 before the first.
        awaits_attention: whether `update` was called and the attention function not yet.
        record_past: whether keys that only queries of the last step see are held until the next step, so that `crop` can take
            tokens of the last step back. transformers sets and resets it.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, config: Any, model_rule: Pattern, pattern: LayerPattern, number: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.pattern, self.options = config, pattern, options
        self.model_rule, self.number, self.num_updates = model_rule, number, 0
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        rule = self.model_rule if self.pattern is None else self.pattern & self.model_rule
        self.cache = KVCache(rule, **self.options)
        self.awaits_attention, self.appended_update, self.is_initialized = False, -1, False

    @property
    def num_seen(self) -> int:
        """Columns appended so far, padding included."""
        return self.cache._num_columns

    def roll_back(self, length: int) -> None:
        """Remove the tokens of the last step, before which the layer held `length` columns."""
        self.awaits_attention = False
        if not length:
            self.reset()
        elif self.num_seen > length:
            self.cache._rollback_last()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as `CachedTensor`s; `attend` appends them. Raises for another attention implementation."""
        if self.config._attn_implementation != ATTN_IMPLEMENTATION:
            raise UnsupportedError(
                "SparseCache drops keys, and the attention of this model (attn_implementation="
                f"{self.config._attn_implementation!r}) does not ask which are left; call fl.hf.register() and "
                "model.set_attn_implementation('farlight') first."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.num_updates += 1
        self.awaits_attention = True
        return CachedTensor.of(key_states, self, self.num_updates), CachedTensor.of(value_states, self, self.num_updates)

    # ---- attention -------------------------------------------------------------------------------------------------------
    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: CachedTensor,
        value: CachedTensor,
        attention_mask: ModelMask | Tensor | None,
        pattern: LayerPattern,
        scaling: float | None,
        dropout: float,
        *,
        score_of: Callable[[int], Score | None] = lambda total: None,
        sinks: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Append the new keys and values, and attend over what the cache keeps: `(B, n_q, H, D)`.

        `query` `(B, H, n_q, D)` are the last tokens; `pattern` is what the module runs under, which must be the cache's;
        `score_of` gives the model's terms on the scores for a number of columns so far.
        Raises UnsupportedError for masks, patterns and options under which keys already dropped would be needed.
        """
        name = type(module).__name__
        self.awaits_attention = False
        self._check_call(name, pattern, dropout, indices)
        is_new = self.appended_update != self.num_updates
        num_before = self.num_seen - (0 if is_new else key.shape[2])
        total = num_before + key.shape[2]
        mask = self._model_mask(name, query, total, attention_mask, getattr(module, "is_causal", True))
        residual = self._residual_mask(name, mask, query, total)
        real = None  # (B, total) where the cache counts the real tokens of each text
        if mask.key_real is not None and self._counts_real_tokens(name, mask.key_real):
            real = mask.key_real.expand(query.shape[0], -1)
        if real is not None and residual == padding(mask.key_real):
            residual = None  # padding is not appended, so it needs no mask
        elif residual is not None and (real is not None or isinstance(self.pattern, Router)):
            raise UnsupportedError(
                f"{name} masks keys by {mask.pattern!r} beside {self.pattern!r}, which counts the tokens of each text or reads "
                "their content; generate from texts of one length, or with the cache that transformers makes."
            )
        # A layer that attends twice over the same keys, or over those of another layer, finds them appended.
        if is_new:
            self._check_padding(name, num_before, real, query.shape[0])
        score = score_of(total)
        if real is not None and score is not None and any(isinstance(term, KeyBias) for term in score.terms):
            raise UnsupportedError(
                f"{name} adds a bias to each column of a padded batch in which {self.pattern!r} counts the tokens of each "
                "text; generate from texts of one length, or with the cache that transformers makes."
            )
        if sinks is not None:
            check_sinks(module, sinks, query.shape[1])
            sinks = sinks.flatten()
        if is_new and real is None and residual is None and key.shape[2] == query.shape[2]:
            fused = step(query, key.data_tensor, value.data_tensor, self.cache, scale=scaling, score=score, sinks=sinks)
            assert isinstance(fused, Tensor)
            self.appended_update = self.num_updates
            return fused.transpose(1, 2).contiguous()
        if is_new:
            self.cache.append(key.data_tensor, value.data_tensor, real=None if real is None else real[:, num_before:])
            self.appended_update = self.num_updates
        terms = read_terms(name, query, self.cache, score, sinks, self.cache.length)
        out, _ = masked_decode(query, self.cache, scaling, False, residual, terms)
        return out.transpose(1, 2).contiguous()

    def _check_call(self, name: str, pattern: LayerPattern, dropout: float, indices: Tensor | None) -> None:
        if pattern is not None and pattern != self.pattern:
            raise UnsupportedError(
                f"{name} runs under {pattern!r}, but its cache was made for {self.pattern!r}, and has dropped what that does "
                "not need; make the cache with the model's own pattern."
            )
        if dropout:
            raise UnsupportedError(f"{name} has dropout = {dropout} while it reads a SparseCache; call model.eval() first.")
        if indices is not None:
            raise UnsupportedError(f"{name} chooses keys by itself, among all of them; use the cache that transformers makes.")

    def _check_padding(self, name: str, num_before: int, real: Tensor | None, batch: int) -> None:
        """Raise where the mask marks other earlier columns as padding than when these were appended: padding was not kept."""
        lengths = [num_before] * batch if real is None else real[:, :num_before].sum(1).tolist()
        appended = self.cache.lengths
        if lengths != (appended * batch if len(appended) == 1 else appended):
            raise UnsupportedError(
                f"{name}: the attention_mask takes other tokens for padding than in the passes before, which kept {appended} "
                "tokens of the texts; pass the same mask, made longer, at every pass."
            )

    def _residual_mask(self, name: str, mask: ModelMask, query: Tensor, total: int) -> Pattern | None:
        """The part of the model's mask that the cache's rule does not imply; None where the rule implies all of it.

        The rule must not forbid a pair that the mask allows, since its key may be gone. A sliding window that the configuration
        names and the mask does not is given up before the first token is appended.
        """
        parts, n_q = conjuncts(mask.pattern), query.shape[2]
        if parts == [full()] and n_q == 1 and self.model_rule == causal():
            return None
        if self.model_rule not in parts and causal() in parts and not self.num_seen:
            self.model_rule = causal()
            self.reset()
        implied_causality = self.model_rule == causal() and isinstance(self.pattern, Pattern) and looks_back(self.pattern)
        if self.model_rule in parts or implied_causality:
            rest = [part for part in parts if part not in (self.model_rule, full())]
            return functools.reduce(operator.and_, rest) if rest else None
        rule_mask = self.model_rule.dense(n_q, total, q_offset=total - n_q, device=query.device)
        dense_mask = mask.pattern.dense(n_q, total, batch=query.shape[0], q_offset=mask.q_offset, device=query.device)
        if bool((dense_mask & ~rule_mask).any()):
            raise UnsupportedError(
                f"{name}: the model's mask lets queries see keys that {self.model_rule!r}, by which this cache drops keys, "
                "does not; use the cache that transformers makes."
            )
        return mask.pattern

    def _model_mask(self, name: str, query: Tensor, total: int, attention_mask: Any, is_causal: bool) -> ModelMask:
        """The model's own mask over `total` columns, the last of which are the queries."""
        offset = total - query.shape[2]
        mask = attention_mask.model_mask if isinstance(attention_mask, LazyMask) else attention_mask
        if isinstance(mask, Tensor):
            mask = tensor_mask(mask, query.shape[2], total)
        elif mask is None:
            if not is_causal:
                raise UnsupportedError(f"{name} is not causal; a SparseCache serves generation only.")
            mask = ModelMask(causal(), offset)
        # Where a mask is the same for all queries, models do not say where the queries stand.
        varies_by_query = any(not isinstance(part, full | padding) for part in conjuncts(mask.pattern))
        if (varies_by_query and mask.q_offset != offset) or mask.n_k not in (None, total):
            raise UnsupportedError(
                f"{name}: the model's mask is that of queries from position {mask.q_offset} among {mask.n_k} keys, but this "
                f"cache holds {total} with {query.shape[2]} queries at their end. Pass the attention_mask of the whole text."
            )
        assert isinstance(mask, ModelMask)
        return mask

    def _counts_real_tokens(self, name: str, real: Tensor) -> bool:
        """Whether positions count the real tokens of each text of a padded batch: where the pattern names positions."""
        named, distance = global_tokens | sees_all | seen_by_all, full | causal | window | offsets
        atoms = list(self.pattern.atoms()) if isinstance(self.pattern, Pattern) else []
        if not any(isinstance(atom, named) for atom in atoms):
            return False
        others = [a for a in atoms if not isinstance(a, named | distance) and not (isinstance(a, strided) and a.phase is None)]
        if others or bool((real[:, :-1] & ~real[:, 1:]).any()):
            what = f"{others[0]!r} counts places in the rows" if others else "the padding does not stand before the texts"
            raise UnsupportedError(
                f"{name}: in a padded batch the positions that {self.pattern!r} names count the tokens of each text, but "
                f"{what}; generate from texts of one length, or pad on the left and give distances and named positions only."
            )
        return True

    # ---- the interface of transformers' cache layers ---------------------------------------------------------------------
    def get_seq_length(self) -> int:
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_seen + query_length, 0

    def get_max_length(self) -> int:
        max_length = self.cache.max_length
        return -1 if max_length is None else max_length

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

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back. Raises UnsupportedError where a key that is needed is gone."""
        num_removed = abs(tokens_to_remove)
        if not num_removed or not self.is_initialized:
            return
        if len(self.cache.lengths) > 1:
            raise UnsupportedError(
                f"SparseCache: {num_removed} tokens cannot be taken back from a padded batch whose texts have positions of "
                "their own; generate for one text at a time."
            )
        try:
            self.cache.crop(max(0, self.cache.length - num_removed))
        except ArgumentError as error:
            raise UnsupportedError(
                f"SparseCache: {num_removed} tokens cannot be taken back, since keys that only they made unneeded are gone. "
                f"{error} SparseCache(…, keep_back=…) passes it on."
            ) from error

    def offload(self) -> None:
        raise UnsupportedError("SparseCache stays on the model's device; make it without offloading.")
