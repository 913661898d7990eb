"""Hugging Face's `generate` with a cache that forgets only what can be forgotten.

transformers hands a layer's new keys to the cache, and whatever the cache returns to the attention function. Here that is the
new keys again, as tensors that know the layer of the cache that took them in (`HandedOut`); farlight's attention function asks
that layer. Any other attention function would see too few keys, so the cache refuses to work under one, and for models that
compute with the keys on the way.

A forward pass is one step, all or nothing. The layers take its tokens in one after the other; where it ended early (Ctrl-C),
the next one finds layers of unequal length, and those ahead give the tokens back.

This file and `cache_layer.py` import transformers at their heads, since they inherit from it; they are loaded when asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache

from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.attention_function import SETTING, Chosen
from farlight.hf.cache_layer import SparseLayer, rule_of
from farlight.hf.cached_tensors import REMEDY
from farlight.hf.layers import attention_layers
from farlight.patterns.expression import Pattern
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
        UnsupportedError: the model's layers keep something else than keys and values; and at the first pass, where they
            compute with keys after the cache took them (latent attention).

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
        own = [rule_of(layer) for layer in DynamicCache(config=config).layers]
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
        if not self._kept_by:
            raise UnsupportedError("SparseCache: no layer of this model keeps keys; use the cache that transformers makes.")
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
                    f"asking what is left of them. {REMEDY}"
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
                if layer.cache._last_width > 1:
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


def _chosen_for(model: nn.Module) -> dict[int, Chosen]:
    """What the model's layers run under now, by number."""
    found = {number: module.__dict__.get(SETTING) for number, module in attention_layers(model).items()}
    return {number: setting.chosen for number, setting in found.items() if setting is not None}
