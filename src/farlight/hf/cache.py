"""Hugging Face's `generate` with a cache that forgets only what can be forgotten.

transformers hands a layer's new keys to the cache, and whatever the cache returns to the attention function. Here that is the
new keys again, as tensors that know the layer of the cache that took them in (`HandedOut`); farlight's attention function asks
that layer. Any other attention function would see too few keys, so the cache refuses to work under one, and for models that
compute with the keys on the way.

A forward pass is one step, all or nothing. The layers take its tokens in one after the other; where it ended early (Ctrl-C),
the next one finds layers of unequal length, and those ahead give the tokens back.

The only file of farlight that imports transformers at its head, since it inherits from it; it is loaded when it is asked for.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from farlight.decoding.cache import KVCache
from farlight.decoding.decode import answer
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.attend import SETTING, Chosen
from farlight.hf.extras import sinks_merged
from farlight.hf.handed_out import HandedOut
from farlight.hf.interface import KEY
from farlight.hf.layers import attention_layers
from farlight.hf.lazy import ModelMask
from farlight.hf.masks import tensor_mask
from farlight.patterns import causal, full, global_tokens, offsets, padding, seen_by_all, sees_all, strided, window
from farlight.patterns.algebra import Intersection, looks_back
from farlight.patterns.base import Pattern
from farlight.routing import Router

__all__ = ["SparseCache", "SparseLayer"]


class SparseCache(Cache):
    """A transformers cache that keeps, layer by layer, only the keys that some later token may still see.

        model.generate(ids, past_key_values=fl.hf.SparseCache(model, pattern))

    gives, token for token, what the model generates under `fl.hf.use_pattern(model, pattern)` without a cache. A pair is seen
    when the model itself allows it (causality, sliding windows, padding) and `pattern` does. Keys keep the rotary positions
    they had. Works under attn_implementation="farlight" only.

    Args:
        model_or_config: the model, or its configuration.
        pattern: one pattern or router for all layers, or {layer number: pattern or router}, where layers that are not named
            follow the model's own attention. None: what `fl.hf.sparsify` gave the model, else its own attention.
        max_length: the greatest length of prompt and answer together, for patterns that need to know it: see `fl.KVCache`.

    In a batch that is padded on the left, named positions count the tokens of each text, as in the model without a cache.
    `cache.nbytes`, `cache.kept` say what is held. Beam search works; taking tokens back (`crop`, assisted generation) cannot,
    since what was dropped is gone.

    Raises:
        ArgumentError: the pattern is no pattern, or names a layer that the model does not have.
        PatternError: the pattern depends on the length of the text, and `max_length` is not given.
        UnsupportedError: the model's layers keep something else than keys and values.

    >>> import torch, farlight as fl
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).eval()
    >>> fl.hf.register(); model.set_attn_implementation("farlight")
    >>> cache = fl.hf.SparseCache(model, fl.presets.streaming(4, 8))
    >>> model.generate(torch.arange(20)[None], past_key_values=cache, max_new_tokens=10, do_sample=False).shape, cache.kept
    (torch.Size([1, 30]), 12)
    """

    def __init__(
        self,
        model_or_config: Any,
        pattern: Chosen | Mapping[int, Chosen] = None,
        *,
        max_length: int | None = None,
    ) -> None:
        config = getattr(model_or_config, "config", model_or_config)
        if not hasattr(config, "get_text_config"):
            raise ArgumentError(
                f"SparseCache: {type(model_or_config).__name__} is neither a transformers model nor a configuration; pass one."
            )
        config = config.get_text_config(decoder=True)
        own = [_rule_of(layer) for layer in DynamicCache(config=config).layers]
        if pattern is None and isinstance(model_or_config, nn.Module):
            pattern = _chosen_for(model_or_config)
        chosen = dict(pattern) if isinstance(pattern, Mapping) else dict.fromkeys(range(len(own)), pattern)
        for number, part in chosen.items():
            if part is not None and not isinstance(part, Pattern | Router):
                raise ArgumentError(
                    f"SparseCache: the pattern{f' of layer {number}' if isinstance(pattern, Mapping) else ''} is "
                    f"{type(part).__name__}; pass a pattern such as fl.presets.streaming(4, 1024)."
                )
            if isinstance(number, bool) or number not in range(len(own)):
                raise ArgumentError(
                    f"SparseCache: a pattern for layer {number!r}, but the model has layers 0 … {len(own) - 1}."
                )
            if own[number] is None and part is not None and isinstance(pattern, Mapping):
                raise ArgumentError(f"SparseCache: a pattern for layer {number}, which keeps no keys of its own.")
        heads = config.num_attention_heads
        layers = [
            cache_utils.DummyLayer() if rule is None else SparseLayer(config, rule, chosen.get(n), max_length, heads, n)
            for n, rule in enumerate(own)
        ]
        super().__init__(layers=layers)
        self._kept_by = [layer for layer in layers if isinstance(layer, SparseLayer)]
        # Layers without keys may attend over those of others, at any time before the step ends.
        self._shares = len(self._kept_by) < len(layers)
        self._before = 0  # columns in each layer before the step
        self._latest: SparseLayer | None = None  # the layer that took keys last in this step
        self._moving = False

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers now."""
        self._end()
        return sum(layer.cache.nbytes for layer in self._kept_by)

    @property
    def kept(self) -> int:
        """Keys kept, in the layer that keeps most."""
        self._end()
        return max(layer.cache.kept for layer in self._kept_by)

    # ---- steps -----------------------------------------------------------------------------------------------------------
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values of a layer on to its attention, which must be farlight's."""
        layer = self.layers[layer_idx]
        if isinstance(layer, SparseLayer):
            self._begin(layer)
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return found

    def _is_whole(self) -> bool:
        """Whether every layer has taken in the same tokens."""
        return len({layer.seen for layer in self._kept_by}) == 1

    def _begin(self, layer: SparseLayer) -> None:
        """`layer` is about to take in new tokens: of this step, or, where it has those, of the next one."""
        self._refuse_half_moved()
        latest = self._latest
        if layer.seen == self._before:
            if latest is not None and latest is not layer and latest.waiting:
                latest.waiting = False
                raise UnsupportedError(
                    f"SparseCache: layer {latest.number} took new keys, and the model went on to layer {layer.number} without "
                    f"asking what is left of them; {_USE_PATTERN}"
                )
            # A prompt gives its memory back layer by layer; tokens before it are needed until the step is whole.
            if latest is not None and latest is not layer and not self._before and not self._shares:
                latest.cache.forget()
        elif self._is_whole():
            self._before = layer.seen
        else:
            self._take_back()
        self._latest = layer

    def _take_back(self) -> None:
        """The last step ended early: the layers that had taken in its tokens give them back."""
        ahead = [layer.number for layer in self._kept_by if layer.seen > self._before]
        for layer in self._kept_by:
            layer.take_back(self._before)
        self._latest = None
        if not self._before:
            raise UnsupportedError(
                f"SparseCache: of {len(self._kept_by)} layers, {len(ahead)} took in the first text (the last is {ahead[-1]}): "
                "either that pass was interrupted, or this model does not use every layer of the cache. The cache is empty "
                "again; repeat the pass. Where this comes back, use the cache that transformers makes."
            )

    def _end(self) -> None:
        """Between two steps: what only the queries of the last one could see is dropped."""
        if self._before != self._kept_by[0].seen and self._is_whole():
            for layer in self._kept_by:
                if layer.cache._width > 1:
                    layer.cache.forget()
            self._before, self._latest = self._kept_by[0].seen, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of every whole step."""
        self._refuse_half_moved()
        self._end()
        return self._before

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        super().reset()
        self._before, self._latest, self._moving = 0, None, False

    # ---- batch items -----------------------------------------------------------------------------------------------------
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._move(super().reorder_cache, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(super().batch_select_indices, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._move(super().batch_repeat_interleave, repeats)

    def _move(self, move: Callable[[Any], None], items: Any) -> None:
        self._refuse_half_moved()
        self._moving = True
        move(items)
        self._moving = False

    def _refuse_half_moved(self) -> None:
        if self._moving:
            raise UnsupportedError(
                "SparseCache: the choice of batch items was interrupted, so that layers hold different texts; call "
                "cache.reset() and begin again."
            )


_USE_PATTERN = (
    "generate under fl.hf.use_pattern(model, pattern) without SparseCache; transformers' own cache then keeps every key."
)


def _conjuncts(pattern: Pattern) -> list[Pattern]:
    """The patterns that must all allow a pair."""
    return [part for both in pattern.parts for part in _conjuncts(both)] if isinstance(pattern, Intersection) else [pattern]


def _rule_of(layer: Any) -> Pattern | None:
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


def _chosen_for(model: nn.Module) -> dict[int, Chosen]:
    """What the model's layers run under now, by number."""
    found = {number: module.__dict__.get(SETTING) for number, module in attention_layers(model).items()}
    return {number: setting.chosen for number, setting in found.items() if setting is not None}


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
        return self.cache._taken

    def take_back(self, before: int) -> None:
        """Go back to the length before the last step."""
        self.waiting = False
        if not before:
            self.reset()
        elif self.seen > before:
            self.cache._take_back()

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
        key: Tensor,
        value: Tensor,
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
        # A layer that attends twice over the same keys, or over those of another layer, finds them taken in.
        if self.taken != self.updates:
            self.cache.append(key.plain, value.plain, real=new)
            self.taken = self.updates
        out, lse = answer(query, self.cache, scaling, sinks is not None, also)
        if sinks is not None and lse is not None:
            out = sinks_merged(module, out, lse, sinks)
        return out.transpose(1, 2).contiguous()

    def _beside_the_rule(self, name: str, own: ModelMask, query: Tensor, total: int) -> Pattern | None:
        """What the model's mask says beside the rule of the cache: None where that says it all.

        The rule may not say more: pairs that the mask allows would be lost. Before the first token is taken in, a sliding
        window that the configuration names and the mask does not is given up.
        """
        parts, n_q = _conjuncts(own.pattern), query.shape[2]
        if parts == [full()] and n_q == 1 and self.own == causal():
            return None
        if self.own not in parts and causal() in parts and not self.seen:
            self.own = causal()
            self.reset()
        if self.own in parts or (self.own == causal() and isinstance(self.pattern, Pattern) and looks_back(self.pattern)):
            rest = [part for part in parts if part not in (self.own, full())]
            return functools.reduce(operator.and_, rest) if rest else None
        held = self.own.dense(n_q, total, q_offset=total - n_q, device=query.device)
        if bool((own.pattern.dense(n_q, total, batch=query.shape[0], q_offset=own.q_offset, device=query.device) & ~held).any()):
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
        if found.q_offset != offset or found.n_k not in (None, total):
            raise UnsupportedError(
                f"{name}: the model's mask is that of queries from position {found.q_offset} among {found.n_k} keys, but this "
                f"cache holds {total} with {query.shape[2]} queries at their end. Pass the attention_mask of the whole text."
            )
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
