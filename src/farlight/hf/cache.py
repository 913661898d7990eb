"""Hugging Face's `generate` with a cache that forgets only what can be forgotten.

transformers hands a layer's new keys to the cache, and whatever the cache returns to the attention function. Here that is the
new keys again, marked with the layer of the cache that took them in; farlight's attention function finds the mark and asks
that layer. Any other attention function would see too few keys, so the cache refuses to work under one.

The only file of farlight that imports transformers at its head, since it inherits from it; it is loaded when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from farlight.decoding.cache import KVCache
from farlight.decoding.decode import answer
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.interface import KEPT, KEY
from farlight.hf.masks import ModelMask, tensor_mask
from farlight.patterns import causal, full, window
from farlight.patterns.base import Pattern

__all__ = ["SparseCache", "SparseLayer"]


class SparseCache(Cache):  # type: ignore[misc]
    """A transformers cache that keeps, layer by layer, only the keys that some later token may still see.

        model.generate(ids, past_key_values=fl.hf.SparseCache(model, pattern))

    gives, token for token, what the model generates under `fl.hf.use_pattern(model, pattern)` without a cache. A pair is seen
    when the model itself allows it (causality, sliding windows, padding) and `pattern` does. Keys keep the rotary positions
    they had. Works under attn_implementation="farlight" only.

    Args:
        model_or_config: the model, or its configuration.
        pattern: one pattern for all layers, or {layer number: pattern}; layers that are not named, and None, follow the model's
            own attention.
        max_length: the greatest length of prompt and answer together, for patterns that need to know it: see `fl.KVCache`.

    In a padded batch, positions are places in the padded rows, as in the model without a cache; the keys of padding are seen
    by nobody, and are kept as if they were seen. `cache.nbytes`, `cache.kept` say what is held. Beam search works; taking
    tokens back (`crop`, assisted generation) cannot, since what was dropped is gone.

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
        pattern: Pattern | Mapping[int, Pattern | None] | None = None,
        *,
        max_length: int | None = None,
    ) -> None:
        config = getattr(model_or_config, "config", model_or_config)
        if not hasattr(config, "get_text_config"):
            raise ArgumentError(
                f"SparseCache: {type(model_or_config).__name__} is neither a transformers model nor a configuration; pass one."
            )
        config = config.get_text_config(decoder=True)
        own = [self._own(layer) for layer in DynamicCache(config=config).layers]
        chosen = dict(pattern) if isinstance(pattern, Mapping) else dict.fromkeys(range(len(own)), pattern)
        for number, part in chosen.items():
            if part is not None and not isinstance(part, Pattern):
                raise ArgumentError(
                    f"SparseCache: the pattern{f' of layer {number}' if isinstance(pattern, Mapping) else ''} is "
                    f"{type(part).__name__}; pass a pattern such as fl.presets.streaming(4, 1024)."
                )
            if isinstance(number, bool) or number not in range(len(own)):
                raise ArgumentError(
                    f"SparseCache: a pattern for layer {number!r}, but the model has layers 0 … {len(own) - 1}."
                )
        heads = config.num_attention_heads
        super().__init__(layers=[SparseLayer(config, rule, chosen.get(n), max_length, heads) for n, rule in enumerate(own)])

    @staticmethod
    def _own(layer: Any) -> Pattern:
        """What the model itself allows, as far as its configuration says it, from the cache that transformers would make."""
        if getattr(layer, "is_sliding", False):
            return window(int(layer.sliding_window) - 1, 0)
        if type(layer) is not DynamicLayer:
            raise UnsupportedError(
                f"SparseCache: a layer of this model keeps its past in a {type(layer).__name__}, which holds more than "
                "keys and values; use the cache that transformers makes for it."
            )
        return causal()

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers now."""
        return sum(layer.cache.nbytes for layer in self.layers)

    @property
    def kept(self) -> int:
        """Keys kept, in the layer that keeps most."""
        return max(layer.cache.kept for layer in self.layers)


class SparseLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's part of a `SparseCache`."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, config: Any, own: Pattern, pattern: Pattern | None, max_length: int | None, heads: int) -> None:
        super().__init__()
        self.config, self.pattern, self.max_length, self.heads, self.own = config, pattern, max_length, heads, own
        self.reset()

    def reset(self) -> None:
        rule = self.own if self.pattern is None else self.own & self.pattern
        self.cache = KVCache(rule, max_length=self.max_length, heads=self.heads)
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.config._attn_implementation != KEY:
            raise UnsupportedError(
                f"SparseCache drops keys, and attn_implementation={self.config._attn_implementation!r} does not know which; "
                "call fl.hf.register() and model.set_attn_implementation('farlight') first."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cache.append(key_states, value_states)
        marked = key_states.view(key_states.shape)
        setattr(marked, KEPT, self)
        return marked, value_states

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        attention_mask: ModelMask | Tensor | None,
        pattern: Pattern | None,
        scaling: float | None,
        dropout: float,
    ) -> Tensor:
        """What the attention function of transformers returns, `(B, N, H, D)`, for the newest tokens."""
        if pattern is not None and pattern != self.pattern:
            raise UnsupportedError(
                f"{type(module).__name__} runs under {pattern!r}, but its cache was made for {self.pattern!r}, and has dropped "
                "what that does not need; make the cache with the model's own pattern."
            )
        if dropout:
            raise UnsupportedError(
                f"{type(module).__name__} asks for dropout = {dropout} while it reads a SparseCache; call model.eval() first."
            )
        own: Any = attention_mask
        if own is None:
            if not getattr(module, "is_causal", True):
                raise UnsupportedError(f"{type(module).__name__} is not causal; a SparseCache serves generation only.")
            own = ModelMask(causal(), self.cache.length - query.shape[2])
        elif isinstance(own, Tensor):
            own = tensor_mask(own, query.shape[2], self.cache.length)
        # What the rule of the cache says already need not be asked again.
        also = None if own.pattern in (self.own, causal(), full()) else own.pattern
        out, _ = answer(query, self.cache, scaling, False, also)
        return out.transpose(1, 2).contiguous()

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length + query_length, 0

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
