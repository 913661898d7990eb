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
from farlight.hf.attend import KEPT, SETTING, Chosen
from farlight.hf.extras import sinks_merged
from farlight.hf.interface import KEY
from farlight.hf.layers import attention_layers
from farlight.hf.lazy import ModelMask
from farlight.hf.masks import tensor_mask
from farlight.patterns import causal, full, global_tokens, offsets, padding, seen_by_all, sees_all, strided, window
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
        own = [self._own(layer) for layer in DynamicCache(config=config).layers]
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
        most: int = max(layer.cache.kept for layer in self.layers)
        return most


def _chosen_for(model: nn.Module) -> dict[int, Chosen]:
    """What the model's layers run under now, by number."""
    found = {number: module.__dict__.get(SETTING) for number, module in attention_layers(model).items()}
    return {number: setting.chosen for number, setting in found.items() if setting is not None}


class SparseLayer(CacheLayerMixin):
    """One layer's part of a `SparseCache`: new keys wait between `update` and the attention function that asks about them."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, config: Any, own: Pattern, pattern: Chosen, max_length: int | None, heads: int) -> None:
        super().__init__()
        self.config, self.pattern, self.max_length, self.heads, self.own = config, pattern, max_length, heads, own
        self.reset()

    def reset(self) -> None:
        rule = self.own if self.pattern is None else self.pattern & self.own
        self.cache = KVCache(rule, max_length=self.max_length, heads=self.heads)
        self.seen, self.waiting, self.is_initialized = 0, False, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.config._attn_implementation != KEY or self.waiting:
            raise UnsupportedError(
                "SparseCache drops keys, and the attention of this model (attn_implementation="
                f"{self.config._attn_implementation!r}) does not ask which are left; call fl.hf.register() and "
                "model.set_attn_implementation('farlight') first. Where that is done, the model changes keys after the cache "
                "took them, and needs the cache that transformers makes."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        self.waiting = True
        marked = key_states.view(key_states.shape)
        setattr(marked, KEPT, self)
        return marked, value_states

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
        own = self._mask(name, query, attention_mask, getattr(module, "is_causal", True))
        also: Pattern | None = own.pattern
        real = own.key_real
        new = None
        if real is not None and self._counts_by_text(name, real):
            if also in (padding(real), causal() & padding(real), self.own & padding(real)):
                also = full()
            new = real[:, -key.shape[2] :]
        # What the rule of the cache says already need not be asked again.
        if also not in (self.own, causal(), full()) and (new is not None or isinstance(self.pattern, Router)):
            raise UnsupportedError(
                f"{name} masks keys by {also!r} beside {self.pattern!r}, which counts the tokens of each text or reads their "
                "content; generate from texts of one length, or with the cache that transformers makes."
            )
        self.cache.append(key, value, real=new)
        also = None if also in (self.own, causal(), full()) else also
        out, lse = answer(query, self.cache, scaling, sinks is not None, also)
        if sinks is not None and lse is not None:
            out = sinks_merged(module, out, lse, sinks)
        if key.shape[2] > 1:
            self.cache.forget()
        return out.transpose(1, 2).contiguous()

    def _mask(self, name: str, query: Tensor, mask: Any, is_causal: bool) -> ModelMask:
        """What the model itself allows, of the text so far."""
        mask = getattr(mask, "own", mask)
        if isinstance(mask, ModelMask):
            return mask
        if isinstance(mask, Tensor):
            return tensor_mask(mask, query.shape[2], self.seen)
        if not is_causal:
            raise UnsupportedError(f"{name} is not causal; a SparseCache serves generation only.")
        return ModelMask(causal(), self.seen - query.shape[2])

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
