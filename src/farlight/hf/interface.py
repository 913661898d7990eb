"""farlight as an attention implementation of Hugging Face transformers.

transformers looks up two functions under one name: one that computes attention and one that builds the mask.
Registering the first without the second makes models drop causality and padding without a word, so here they are only
ever registered together. The pattern to run under is kept on the model's own modules, where recomputation during the
backward pass and other threads find it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from farlight.errors import UnsupportedError
from farlight.hf.masks import ModelMask, model_mask, tensor_mask
from farlight.patterns import causal, full
from farlight.patterns.base import Pattern

__all__ = ["KEPT", "KEY", "Observation", "register", "use_pattern"]

KEY = "farlight"
# The name under which a tensor of new keys carries the cache layer that took them in.
KEPT = "_farlight_kept"
_SETTING = "_farlight_setting"

# Arguments that a model may hand to its attention and that change nothing about which pairs are seen or how they count:
# bookkeeping of the caller, hints for other kernels, and `sliding_window`, which is already part of the model's mask.
_WITHOUT_EFFECT = frozenset({
    "cache_position", "deterministic", "logits_to_keep", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "past_key_values", "position_ids", "return_dict", "sliding_window", "use_cache",
})  # fmt: skip

_MEANING = {
    "softcap": "squashes the scores before the softmax",
    "s_aux": "adds attention sinks to the softmax",
    "sinks": "adds attention sinks to the softmax",
    "position_bias": "adds a bias to the scores",
    "indices": "restricts each query to chosen keys",
    "block_indices": "restricts each query to chosen blocks of keys",
    "cache": "reads keys and values from a paged cache",
    "cu_seq_lens_q": "packs several sequences into one; pass position_ids instead, from which farlight finds them",
    "cu_seq_lens_k": "packs several sequences into one; pass position_ids instead, from which farlight finds them",
    "max_length_q": "packs several sequences into one; pass position_ids instead, from which farlight finds them",
    "max_length_k": "packs several sequences into one; pass position_ids instead, from which farlight finds them",
    "output_attentions": "asks for the attention probabilities, which are never formed",
}


@dataclass(frozen=True)
class Observation:
    """One call of a layer's attention, as `use_pattern`'s observer sees it before it runs.

    `q` is `(B, H, n_q, D)`, `k` and `v` are `(B, H_kv, n_k, D)`; `own` is what the model itself allows, and `scale` is
    the factor on the scores (None = D^-0.5).
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    own: Pattern
    q_offset: int


@dataclass(frozen=True)
class _Setting:
    pattern: Pattern | None = None
    backend: str = "auto"
    observer: Callable[[Observation], None] | None = None


def register() -> None:
    """Make `attn_implementation="farlight"` known to transformers. Calling it again changes nothing.

    A model that runs under this name computes its own attention exactly, causality, sliding windows and padding
    included, until `use_pattern` gives it a sparser one. Raises ImportError when transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("farlight.hf needs transformers, which cannot be imported; pip install 'farlight[hf]'.") from error
    AttentionMaskInterface.register(KEY, model_mask)
    AttentionInterface.register(KEY, attention_forward)


@contextmanager
def use_pattern(
    model: Any,
    pattern: Pattern | None,
    *,
    backend: str = "auto",
    observer: Callable[[Observation], None] | None = None,
) -> Iterator[Any]:
    """Run a Hugging Face model under `pattern` for the length of a `with` block, then put everything back.

    A pair is seen when the model itself allows it and `pattern` does; None leaves the model's own attention. `observer`
    is called with an `Observation` for each layer before it runs.

    The setting belongs to the model: two threads may use two models at once, not one model under two patterns.

    Raises:
        UnsupportedError: the model does not take its attention from transformers' AttentionInterface, or it has
            cross-attention, whose queries and keys are positions of two different texts.

    >>> import torch, farlight as fl
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    >>> model = BertModel(BertConfig(**sizes)).eval()
    >>> with torch.no_grad(), use_pattern(model, fl.window(2)):
    ...     model(torch.arange(6)[None]).last_hidden_state.shape
    torch.Size([1, 6, 8])
    """
    register()
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedError(f"{name} is not a transformers model; use_pattern needs a PreTrainedModel.")
    if pattern is not None and (getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)):
        raise UnsupportedError(
            f"{name} has cross-attention, in which a query and a key are positions of two different texts; a pattern "
            "speaks of one text. Use its encoder alone (model.get_encoder())."
        )
    implementations = _implementations(model)
    settings = [(module, module.__dict__.get(_SETTING)) for module in model.modules()]
    try:
        model.set_attn_implementation(KEY)
        if config._attn_implementation != KEY:
            raise UnsupportedError(
                f"{name} does not take its attention from transformers' AttentionInterface, so no other attention can "
                "be plugged in. Use a model of the same family whose modeling file calls ALL_ATTENTION_FUNCTIONS."
            )
        for module, _ in settings:
            module.__dict__[_SETTING] = _Setting(pattern, backend, observer)
        yield model
    finally:
        for module, before in settings:
            if before is None:
                module.__dict__.pop(_SETTING, None)
            else:
                module.__dict__[_SETTING] = before
        for held, implementation in implementations:
            held._attn_implementation_internal = implementation


def _implementations(model: Any) -> list[tuple[Any, Any]]:
    """Every configuration in the model with the implementation it names now."""
    waiting = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "sub_configs")]
    found: dict[int, tuple[Any, Any]] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = (config, config._attn_implementation_internal)
            waiting += [sub for name in config.sub_configs if (sub := getattr(config, name, None)) is not None]
    return list(found.values())


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers: `(B, H, N, D)` in, `(B, N, H, D)` contiguous out."""
    import farlight

    _refuse_unknown(module, kwargs)
    setting: _Setting = module.__dict__.get(_SETTING) or _Setting()
    kept = getattr(key, KEPT, None)
    if kept is not None:
        return kept.attend(module, query, key, value, attention_mask, setting.pattern, scaling, dropout), None
    own = _own_mask(module, query, key, attention_mask, is_causal, kwargs.get("sliding_window"))
    if own.dropped and setting.pattern is not None:
        raise UnsupportedError(
            f"{type(module).__name__}: the cache has dropped the first {own.dropped} keys, so positions in the "
            "pattern no longer match; generate with a cache that keeps every key, or without a pattern."
        )
    if setting.observer is not None:
        setting.observer(Observation(module, query, key, value, scaling, own.pattern, own.q_offset))
    pattern = own.pattern
    if setting.pattern is not None:
        pattern = setting.pattern if pattern == full() else pattern & setting.pattern
    out = farlight.attention(
        query, key, value, pattern, scale=scaling, q_offset=own.q_offset, dropout=dropout, backend=setting.backend
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise for an argument that would change the result and that farlight would have to drop."""
    for name, value in kwargs.items():
        if value is None or value is False or name in _WITHOUT_EFFECT:
            continue
        meaning = _MEANING.get(name, "is not known to farlight")
        raise UnsupportedError(
            f"{type(module).__name__} passes {name}, which {meaning}; attn_implementation='farlight' does not support "
            "it and would have to ignore it. Use 'eager' or 'sdpa' for this model or call."
        )


def _own_mask(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    mask: ModelMask | Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> ModelMask:
    """What the model allows by itself."""
    n_q, n_k = q.shape[2], k.shape[2]
    if isinstance(mask, ModelMask):
        return mask
    if isinstance(mask, Tensor):
        return tensor_mask(mask, n_q, n_k)
    if mask is not None:
        raise UnsupportedError(
            f"{type(module).__name__} passes a mask of type {type(mask).__name__}, which was built for another "
            "attention implementation; set attn_implementation='farlight' on the whole model."
        )
    # No mask at all: the model relies on the flag, as with SDPA. A single query is the newest token and
    # sees everything.
    past_only = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if sliding_window is not None or (past_only and 1 < n_q != n_k):
        what = (
            f"a sliding window of {sliding_window}"
            if sliding_window is not None
            else f"causality for {n_q} queries and {n_k} keys"
        )
        raise UnsupportedError(
            f"{type(module).__name__} asks for {what} but passes no mask, so where its queries stand is unknown; pass "
            "an attention_mask to the model."
        )
    return ModelMask(causal() if past_only and n_q > 1 else full(), n_k - n_q)
