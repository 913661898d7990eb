"""What models pass to their attention beyond queries, keys, values and mask: honoured exactly, harmless, or refused.

An argument that changes nothing about which pairs are seen or how they count is known by name. One that restricts the keys
of each query becomes a pattern; attention sinks are merged in by the log-sum-exp. Anything else, and anything unknown, is
an error: a model must not lose a part of its own attention without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from farlight.errors import UnsupportedError
from farlight.patterns import chosen_keys
from farlight.patterns.base import Pattern

__all__ = ["chosen_by_the_model", "refuse_unknown", "sinks_merged"]

# Bookkeeping of the caller, hints for other kernels, and `sliding_window`, which is already part of the model's mask.
_WITHOUT_EFFECT = frozenset({
    "cache_position", "deterministic", "logits_to_keep", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "past_key_values", "position_ids", "return_dict", "sliding_window", "use_cache",
})  # fmt: skip

_HONOURED = frozenset({"indices", "s_aux"})

_PACKED = "packs several sequences into one; pass position_ids instead, from which farlight finds them"
_MEANING = {
    "softcap": "squashes the scores before the softmax",
    "sinks": "adds a sink of its own for each query to the softmax",
    "position_bias": "adds a bias to the scores",
    "block_indices": "restricts each query to chosen blocks of keys",
    "cache": "reads keys and values from a paged cache",
    "cu_seq_lens_q": _PACKED,
    "cu_seq_lens_k": _PACKED,
    "max_length_q": _PACKED,
    "max_length_k": _PACKED,
    "output_attentions": "asks for the attention probabilities, which are never formed",
}


def refuse_unknown(module: nn.Module, given: dict[str, Any]) -> None:
    """Raise UnsupportedError for an argument that would change the result and that farlight would have to drop."""
    for name, value in given.items():
        if value is None or value is False or name in _WITHOUT_EFFECT or name in _HONOURED:
            continue
        meaning = _MEANING.get(name, "is not known to farlight")
        raise UnsupportedError(
            f"{type(module).__name__} passes {name}, which {meaning}; attn_implementation='farlight' does not support "
            "it and would have to ignore it. Use 'eager' or 'sdpa' for this model or call."
        )


def chosen_by_the_model(module: nn.Module, indices: Tensor, q: Tensor, n_k: int) -> Pattern:
    """The keys that a model's own indexer chose for each query, `(B, n_q, count)`, as DeepSeek-V3.2 does.

    Rows with fewer visible keys than `count` name others too, which the model's mask forbids; keys from `n_k` on are empty
    slots of a cache.
    """
    if not isinstance(indices, Tensor) or indices.shape[:-1] != (q.shape[0], q.shape[2]):
        found = tuple(indices.shape) if isinstance(indices, Tensor) else type(indices).__name__
        raise UnsupportedError(
            f"{type(module).__name__} passes indices of shape {found}; farlight reads ({q.shape[0]}, {q.shape[2]}, count), "
            "one list of keys for each query. Use 'eager' or 'sdpa' for this model."
        )
    listed = indices.long()
    return chosen_keys(torch.where(listed < n_k, listed, -1)[:, None])


def sinks_merged(module: nn.Module, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention with one more key of score `sinks[h]` and value 0 in every row: out · σ(lse - sinks).

    GPT-OSS and others learn one number a head that takes part in the softmax and gives nothing. A row that sees no other
    key gives 0. Gradients reach q, k, v and the sinks.
    """
    if sinks.numel() != out.shape[1]:
        raise UnsupportedError(
            f"{type(module).__name__} passes {sinks.numel()} attention sinks for {out.shape[1]} heads; farlight merges one "
            "for each head. Use 'eager' for this model."
        )
    share = torch.sigmoid(lse - sinks.reshape(1, -1, 1).to(lse.dtype))
    return (out.to(lse.dtype) * share.unsqueeze(-1)).to(out.dtype)
