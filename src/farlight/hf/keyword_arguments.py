"""Keyword arguments that models pass to their attention function: without effect, supported, or refused.

Bookkeeping keywords, which change neither the allowed pairs nor the softmax, are listed by name. Key lists of a model's own
indexer become a pattern; attention sinks are merged by the log-sum-exp. Every other keyword raises UnsupportedError, since
ignoring it could change the model's attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from farlight.errors import UnsupportedError
from farlight.patterns import chosen_blocks, chosen_keys, documents
from farlight.patterns.expression import Pattern

__all__ = ["check_sinks", "indexer_pattern", "merge_sinks", "packed_documents", "refuse_unknown"]

# Bookkeeping of the caller, arguments of transformers' losses (models forward all keywords), hints for other kernels, and
# `sliding_window`, which is already part of the model's mask.
_NO_EFFECT = frozenset({
    "cache", "cache_position", "deterministic", "ignore_index", "logits_to_keep", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_ids", "return_dict", "shift_labels",
    "sliding_window", "use_cache",
})  # fmt: skip

_SUPPORTED = frozenset({
    "block_indices", "cu_seq_lens_k", "cu_seq_lens_q", "indices", "output_attentions", "position_bias", "s_aux", "score",
    "softcap",
})  # fmt: skip
# What the lengths of packed sequences already say; without those, refused.
_WITH_LENGTHS = ("max_length_k", "max_length_q")

_PACKED = "packs several sequences into one; pass position_ids instead, from which farlight finds them"
_MEANING = {
    "sinks": "adds a sink of its own for each query to the softmax",
    "max_length_q": _PACKED,
    "max_length_k": _PACKED,
    "seq_idx": _PACKED,
}


def refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedError for a keyword that is not listed here: farlight would have to ignore it."""
    for name, value in kwargs.items():
        if value is None or value is False or name in _SUPPORTED:
            continue
        if name in _WITH_LENGTHS and kwargs.get("cu_seq_lens_q") is not None:
            continue
        if name == "cache" and not hasattr(value, "get_mask_sizes"):
            meaning = "reads keys and values from a paged cache"
        elif name in _NO_EFFECT:
            continue
        else:
            meaning = _MEANING.get(name, "is not known to farlight")
        raise UnsupportedError(
            f"{type(module).__name__} passes {name}, which {meaning}; attn_implementation='farlight' does not support "
            "it and would have to ignore it. Use 'eager' or 'sdpa' for this model or call."
        )


def indexer_pattern(module: nn.Module, kwargs: dict[str, Any], q: Tensor, n_k: int) -> Pattern | None:
    """The keys that the model's own indexer lists for each query, as a pattern; None without an indexer.

    `indices` `(B, n_q, count)` int64 are keys, as in DeepSeek-V3.2; `block_indices` `(B, head groups, n_q, count)` are blocks
    of `module.indexer.block_size` keys, as in MiniMax-M3. Rows with fewer visible keys than `count` list further ones,
    which the model's mask forbids; indices from `n_k` on are empty slots of a cache. Raises UnsupportedError for other shapes.
    """
    keys, blocks = kwargs.get("indices"), kwargs.get("block_indices")
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
    leading = (q.shape[0], groups, q.shape[2])
    _check_indices(module, "block_indices", blocks, leading, f"({q.shape[0]}, groups of heads, {q.shape[2]}, count)")
    block_ids = torch.where(blocks * size < n_k, blocks, -1).long().repeat_interleave(q.shape[1] // groups, 1)
    return chosen_blocks(block_ids, block=size, query_block=1)


def packed_documents(module: nn.Module, kwargs: dict[str, Any], q: Tensor, k: Tensor) -> Pattern | None:
    """The documents of `cu_seq_lens_q` and `cu_seq_lens_k` (cumulative lengths of sequences packed in one row), as a pattern.

    None without them. Raises UnsupportedError where the sequences of queries and keys differ, and outside one packed row.
    """
    of_q, of_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if of_q is None and of_k is None:
        return None
    of_q, of_k = (of_k if of_q is None else of_q), (of_q if of_k is None else of_k)
    packed = documents(cu_seqlens=of_k)
    tokens = q.shape[2]
    same = of_q is of_k or (not torch.compiler.is_compiling() and torch.equal(torch.as_tensor(of_q), torch.as_tensor(of_k)))
    if q.shape[0] != 1 or k.shape[2] != tokens or not same or _total(packed) not in (None, tokens):
        raise UnsupportedError(
            f"{type(module).__name__} passes cu_seq_lens_q and cu_seq_lens_k for {q.shape[0]} × {tokens} queries and "
            f"{k.shape[2]} keys; farlight reads equal lengths of all tokens of one row, without a cache. Use "
            "fl.packed_attention, or 'flash_attention_2' for this call."
        )
    return packed


def _total(packed: Pattern) -> int | None:
    """The tokens of all documents; None where their lengths cannot be read yet."""
    lengths = getattr(packed, "lengths", None)
    return None if lengths is None else sum(lengths[0])


def _check_indices(module: nn.Module, name: str, indices: Any, leading: tuple[int, ...], expected: str) -> None:
    if not isinstance(indices, Tensor) or indices.shape[:-1] != leading:
        shape = tuple(indices.shape) if isinstance(indices, Tensor) else type(indices).__name__
        raise UnsupportedError(
            f"{type(module).__name__} passes {name} of shape {shape}; farlight reads {expected}, one list for each query. Use "
            "'eager' or 'sdpa' for this model."
        )


def check_sinks(module: nn.Module, sinks: Tensor, heads: int) -> None:
    """Raise UnsupportedError unless there is one sink for each head."""
    if sinks.numel() != heads:
        raise UnsupportedError(
            f"{type(module).__name__} passes {sinks.numel()} attention sinks for {heads} heads; farlight merges one "
            "for each head. Use 'eager' for this model."
        )


def merge_sinks(module: nn.Module, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention sinks: one more key of score `sinks[h]` and value 0 in every row, out · σ(lse - sinks).

    `out` `(B, H, n_q, D)`, `lse` `(B, H, n_q)`, `sinks` `(H,)` learned logits, as in GPT-OSS. A row that sees no other key
    gives 0. Gradients reach q, k, v and the sinks. Raises UnsupportedError unless there is one sink for each head.
    """
    check_sinks(module, sinks, out.shape[1])
    weight = torch.sigmoid(lse - sinks.reshape(1, -1, 1).to(lse.dtype))
    return (out.to(lse.dtype) * weight.unsqueeze(-1)).to(out.dtype)
