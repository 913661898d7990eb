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
from farlight.patterns import chosen_blocks, chosen_keys
from farlight.patterns.expression import Pattern

__all__ = ["chosen_by_the_model", "refuse_unknown", "sinks_merged"]

# Bookkeeping of the caller, arguments of transformers' losses, which a model's keywords carry along, hints for other kernels,
# and `sliding_window`, which is already part of the model's mask.
_WITHOUT_EFFECT = frozenset({
    "cache", "cache_position", "deterministic", "ignore_index", "logits_to_keep", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_ids", "return_dict", "shift_labels",
    "sliding_window", "use_cache",
})  # fmt: skip

_HONOURED = frozenset({"block_indices", "indices", "output_attentions", "s_aux"})

_PACKED = "packs several sequences into one; pass position_ids instead, from which farlight finds them"
_MEANING = {
    "softcap": "squashes the scores before the softmax",
    "sinks": "adds a sink of its own for each query to the softmax",
    "position_bias": "adds a bias to the scores",
    "cu_seq_lens_q": _PACKED,
    "cu_seq_lens_k": _PACKED,
    "max_length_q": _PACKED,
    "max_length_k": _PACKED,
    "seq_idx": _PACKED,
}


def refuse_unknown(module: nn.Module, given: dict[str, Any]) -> None:
    """Raise UnsupportedError for an argument that would change the result and that farlight would have to drop."""
    for name, value in given.items():
        if value is None or value is False or name in _HONOURED:
            continue
        if name == "cache" and not hasattr(value, "get_mask_sizes"):
            meaning = "reads keys and values from a paged cache"
        elif name in _WITHOUT_EFFECT:
            continue
        else:
            meaning = _MEANING.get(name, "is not known to farlight")
        raise UnsupportedError(
            f"{type(module).__name__} passes {name}, which {meaning}; attn_implementation='farlight' does not support "
            "it and would have to ignore it. Use 'eager' or 'sdpa' for this model or call."
        )


def chosen_by_the_model(module: nn.Module, given: dict[str, Any], q: Tensor, n_k: int) -> Pattern | None:
    """The keys that a model's own indexer chose for each query; None where it has none.

    `indices` `(B, n_q, count)` are keys, as in DeepSeek-V3.2; `block_indices` `(B, groups of heads, n_q, count)` are blocks of
    `module.indexer.block_size` keys, as in MiniMax-M3. Rows with fewer visible keys than `count` name others too, which the
    model's mask forbids; what lies at `n_k` and beyond are empty slots of a cache.
    """
    keys, blocks = given.get("indices"), given.get("block_indices")
    if keys is not None:
        _check_indices(module, "indices", keys, (q.shape[0], q.shape[2]), f"({q.shape[0]}, {q.shape[2]}, count)")
        return chosen_keys(torch.where(keys < n_k, keys, -1)[:, None].long())
    if blocks is None:
        return None
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if not isinstance(size, int):
        raise UnsupportedError(
            f"{type(module).__name__} passes block_indices, but has no indexer.block_size that says how long a block is; use "
            "'eager' or 'sdpa' for this model."
        )
    groups = blocks.shape[1] if isinstance(blocks, Tensor) and blocks.dim() == 4 and q.shape[1] % blocks.shape[1] == 0 else 1
    wanted = (q.shape[0], groups, q.shape[2])
    _check_indices(module, "block_indices", blocks, wanted, f"({q.shape[0]}, groups of heads, {q.shape[2]}, count)")
    listed = torch.where(blocks * size < n_k, blocks, -1).long().repeat_interleave(q.shape[1] // groups, 1)
    return chosen_blocks(listed, block=size, query_block=1)


def _check_indices(module: nn.Module, name: str, indices: Any, wanted: tuple[int, ...], spelled: str) -> None:
    if not isinstance(indices, Tensor) or indices.shape[:-1] != wanted:
        found = tuple(indices.shape) if isinstance(indices, Tensor) else type(indices).__name__
        raise UnsupportedError(
            f"{type(module).__name__} passes {name} of shape {found}; farlight reads {spelled}, one list for each query. Use "
            "'eager' or 'sdpa' for this model."
        )


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
