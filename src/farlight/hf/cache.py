"""`SparseCache`: a cache for Hugging Face's `generate` that drops only keys no later token can see.

transformers passes a layer's new keys and values to the cache and whatever the cache returns to the attention function. Here
`update` returns the new ones as tensors that name their cache layer (`CachedTensor`); farlight's attention function calls that
layer, which attends over the keys it keeps. Another attention function would see too few keys, so the cache refuses to work
under one, and for models that compute with the returned keys.

A forward pass is one step: it is appended to every layer or to none. The layers append its tokens one after the other. After a
pass that was interrupted (Ctrl-C), the next pass finds layers of unequal length and rolls the longer ones back.

This file and `cache_layer.py` import transformers at module level, since they inherit from its classes; `farlight.hf` imports
them on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache

from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.cache_layer import SparseLayer, model_rule_of
from farlight.hf.cached_tensors import REMEDY, call_outside_graph
from farlight.hf.layers import attention_layers
from farlight.hf.setting import ATTN_IMPLEMENTATION, SETTING, LayerPattern, setting_of
from farlight.hf.sparsify import sparsify
from farlight.patterns.expression import Pattern
from farlight.routing import Router

__all__ = ["SparseCache", "SparseLayer"]


class SparseCache(Cache):
    """A transformers cache that keeps, layer by layer, only the keys that a later token may still see.

        model.generate(ids, past_key_values=fl.hf.SparseCache(model, pattern))

    generates the same tokens as `fl.hf.use_pattern(model, pattern)` without a cache. A pair is allowed when the model's own
    mask (causality, sliding windows, padding) and `pattern` both allow it. Keys keep their rotary positions. Works under
    attn_implementation="farlight" only.

    Args:
        model_or_config: the model, which is switched to farlight's attention and to this pattern, as
            `fl.hf.sparsify(model, pattern)` does; or its configuration, which switches nothing.
        pattern: one pattern or router for all layers, or {layer number: pattern or router}, where layers that are not named
            follow the model's own attention. None: what `fl.hf.sparsify` gave the model, else its own attention.
        max_length, dtype, keep_back: the greatest length of prompt and answer together, for patterns that need to know it; the
            element type of stored keys and values ("int8", torch.bfloat16, …); tokens that `crop` can take back beyond the last
            pass: see `fl.KVCache`.

    In a batch that is padded on the left, named positions count the tokens of each text, as in the model without a cache.
    `cache.nbytes` is the memory in use, `cache.kept` the number of keys. Beam search, assisted generation and prompt lookup
    work; `crop` takes back tokens of the last pass, and raises beyond it where keys that are needed again are gone.

    Raises:
        ArgumentError: the pattern is no pattern, or names a layer that the model does not have.
        PatternError: the pattern depends on the length of the text, and `max_length` is not given.
        UnsupportedError: the model's layers keep something else than keys and values, or the keys of images (Mllama); and at
            the first pass, where they compute with keys after the cache took them (latent attention).

    >>> import torch, farlight as fl
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).eval()
    >>> cache = fl.hf.SparseCache(model, fl.presets.streaming(4, 8))
    >>> model.generate(torch.arange(20)[None], past_key_values=cache, max_new_tokens=10, do_sample=False).shape, cache.kept
    (torch.Size([1, 30]), 12)
    """

    def __init__(
        self,
        model_or_config: Any,
        pattern: LayerPattern | Mapping[int, LayerPattern] = None,
        *,
        max_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        keep_back: int = 0,
    ) -> None:
        config = getattr(model_or_config, "config", model_or_config)
        if not hasattr(config, "get_text_config"):
            raise ArgumentError(
                f"SparseCache: {type(model_or_config).__name__} is neither a transformers model nor a configuration; pass one."
            )
        config = config.get_text_config(decoder=True)
        if getattr(config, "cross_attention_layers", None):
            raise UnsupportedError(
                f"SparseCache: layers {list(config.cross_attention_layers)} of this model keep the keys of images, which no "
                "pattern of the text may drop. Generate under fl.hf.use_pattern(model, pattern) without SparseCache."
            )
        rules = [model_rule_of(layer) for layer in DynamicCache(config=config).layers]
        if pattern is None and isinstance(model_or_config, nn.Module):
            pattern = _patterns_of(model_or_config)
        patterns = dict(pattern) if isinstance(pattern, Mapping) else dict.fromkeys(range(len(rules)), pattern)
        _check_patterns(patterns, rules, by_layer=isinstance(pattern, Mapping))
        if isinstance(model_or_config, nn.Module):
            _switch(model_or_config, config, pattern)
            switched: Any = model_or_config.config  # a switched model has a new configuration
            config = switched.get_text_config(decoder=True)
        options = {"max_length": max_length, "dtype": dtype, "keep_back": keep_back}
        layers = [
            cache_utils.DummyLayer()
            if rule is None
            else SparseLayer(config, rule, patterns.get(n), n, options | {"heads": _heads(config, n)})
            for n, rule in enumerate(rules)
        ]
        super().__init__(layers=layers)
        self._sparse_layers = [layer for layer in layers if isinstance(layer, SparseLayer)]
        if not self._sparse_layers:
            raise UnsupportedError("SparseCache: no layer of this model keeps keys; use the cache that transformers makes.")
        # Layers without keys may attend over those of others, at any time before the step ends.
        self._has_keyless_layers = len(self._sparse_layers) < len(layers)
        self._step_start = 0  # columns in each layer before the current step
        self._last_updated: SparseLayer | None = None  # the layer updated last in the current step
        self._is_reordering = False  # set while batch items are selected, and left set by an interruption

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values in all layers."""
        self._end_step()
        return sum(layer.cache.nbytes for layer in self._sparse_layers)

    @property
    def kept(self) -> int:
        """Number of keys in the layer that keeps most."""
        self._end_step()
        return max(layer.cache.kept for layer in self._sparse_layers)

    def __repr__(self) -> str:
        nbytes, caches = self.nbytes, [layer.cache for layer in self._sparse_layers]
        least, most = min(cache.kept for cache in caches), self.kept
        kept = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        layers = f"{len(caches)} layer{'s' * (len(caches) != 1)}"
        return f"SparseCache({layers}, each with {kept} of {caches[0].length:,} keys; {nbytes:,} bytes)"

    # ---- steps -----------------------------------------------------------------------------------------------------------
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values of a layer, tagged with their cache layer for farlight's attention function."""
        if torch.compiler.is_compiling():
            handles: tuple[Tensor, Tensor] = call_outside_graph(
                SparseCache.update, self, key_states, value_states, layer_idx, *args, **kwargs
            )
            return handles
        layer = self.layers[layer_idx]
        if isinstance(layer, SparseLayer):
            self._begin_update(layer)
        tensors: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return tensors

    def _has_equal_lengths(self) -> bool:
        """Whether every layer has appended the same tokens."""
        return len({layer.num_seen for layer in self._sparse_layers}) == 1

    def _begin_update(self, layer: SparseLayer) -> None:
        """Before `layer` receives new tokens: those of the current step, or of the next one where it has the current ones."""
        self._refuse_half_reordered()
        last = self._last_updated
        if layer.num_seen == self._step_start:
            if last is not None and last is not layer and last.awaits_attention:
                last.awaits_attention = False
                raise UnsupportedError(
                    f"SparseCache: layer {last.number} took new keys, and the model went on to layer {layer.number} without "
                    f"attending over them. {REMEDY}"
                )
            # The memory of a first prompt is freed layer by layer. In later steps `_roll_back` may need the dropped keys.
            is_whole = last is not None and last is not layer and not self._has_keyless_layers
            if last is not None and is_whole and not self._step_start and not last.record_past:
                last.cache.forget()
        elif self._has_equal_lengths():
            self._step_start = layer.num_seen
        else:
            self._roll_back()
        self._last_updated = layer

    def _roll_back(self) -> None:
        """Remove the tokens of an interrupted step from the layers that have appended them."""
        longer = [layer.number for layer in self._sparse_layers if layer.num_seen > self._step_start]
        for layer in self._sparse_layers:
            layer.roll_back(self._step_start)
        self._last_updated = None
        if not self._step_start:
            raise UnsupportedError(
                f"SparseCache: of {len(self._sparse_layers)} layers, {len(longer)} took in the first text (the last is "
                f"{longer[-1]}): either that pass was interrupted, or this model does not use every layer of the cache. The "
                "cache is empty again; repeat the pass. Where this comes back, use the cache that transformers makes."
            )

    def _end_step(self) -> None:
        """Between two steps: drop the keys that only queries of the last one could see."""
        if self._step_start != self._sparse_layers[0].num_seen and self._has_equal_lengths():
            for layer in self._sparse_layers:
                if layer.cache._last_width > 1 and not layer.record_past:
                    layer.cache.forget()
            self._step_start, self._last_updated = self._sparse_layers[0].num_seen, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of all complete steps."""
        if torch.compiler.is_compiling():
            length: int = call_outside_graph(SparseCache.get_seq_length, self, layer_idx)
            return length
        self._refuse_half_reordered()
        self._end_step()
        return self._step_start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back, in every layer or in none."""
        self._refuse_half_reordered()
        self._end_step()
        if tokens_to_remove > 0:
            raise ArgumentError(
                f"SparseCache.crop: {tokens_to_remove}: pass a negative number, the tokens to take back, as transformers does."
            )
        forks = [layer.cache.fork() for layer in self._sparse_layers] if tokens_to_remove else []
        try:
            super().crop(tokens_to_remove)
        except UnsupportedError:
            for layer, before in zip(self._sparse_layers, forks, strict=True):
                layer.cache = before
            raise
        self._step_start, self._last_updated = self._sparse_layers[0].num_seen, None

    def reset(self) -> None:
        super().reset()
        self._step_start, self._last_updated, self._is_reordering = 0, None, False

    # ---- batch items -----------------------------------------------------------------------------------------------------
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._reorder(super().reorder_cache, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._reorder(super().batch_select_indices, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._reorder(super().batch_repeat_interleave, repeats)

    def _reorder(self, select: Callable[[Any], None], items: Any) -> None:
        self._refuse_half_reordered()
        self._is_reordering = True
        select(items)
        self._is_reordering = False

    def _refuse_half_reordered(self) -> None:
        if self._is_reordering:
            raise UnsupportedError(
                "SparseCache: the choice of batch items was interrupted, so that layers hold different texts; call "
                "cache.reset() and begin again."
            )


def _heads(config: Any, layer: int) -> int:
    """The query heads of a layer."""
    differs_by_layer = getattr(config, "is_heterogeneous", False)
    heads: int = (config.per_layer_config[layer] if differs_by_layer else config).num_attention_heads
    return heads


def _switch(model: nn.Module, config: Any, pattern: LayerPattern | Mapping[int, LayerPattern]) -> None:
    """Let every layer of the model run under farlight and its pattern; a model that does so already stays as it is."""
    layers = attention_layers(model)
    wanted = pattern if isinstance(pattern, Mapping) else dict.fromkeys(layers, pattern)
    is_switched = all(setting_of(module).pattern == wanted.get(number) for number, module in layers.items())
    if config._attn_implementation != ATTN_IMPLEMENTATION or not is_switched:
        sparsify(model, pattern)


def _check_patterns(patterns: Mapping[int, LayerPattern], rules: list[Pattern | None], by_layer: bool) -> None:
    """Raise ArgumentError for an entry that is no pattern or router, or for a layer that does not exist or keeps no keys."""
    for number, pattern in patterns.items():
        if pattern is not None and not isinstance(pattern, Pattern | Router):
            raise ArgumentError(
                f"SparseCache: the pattern{f' of layer {number}' if by_layer else ''} is {type(pattern).__name__}; pass a "
                "pattern such as fl.presets.streaming(4, 1024)."
            )
        if isinstance(number, bool) or number not in range(len(rules)):
            raise ArgumentError(f"SparseCache: a pattern for layer {number!r}, but the model has layers 0 … {len(rules) - 1}.")
        if rules[number] is None and pattern is not None and by_layer:
            raise ArgumentError(f"SparseCache: a pattern for layer {number}, which keeps no keys of its own.")


def _patterns_of(model: nn.Module) -> dict[int, LayerPattern]:
    """The pattern of each layer that has a setting, by layer number."""
    settings = {number: module.__dict__.get(SETTING) for number, module in attention_layers(model).items()}
    return {number: setting.pattern for number, setting in settings.items() if setting is not None}
