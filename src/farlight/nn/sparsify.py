"""`sparsify`: every `nn.MultiheadAttention` in a module under a pattern; `scaled_dot_product_attention` as torch calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from farlight.attention import attention
from farlight.errors import ArgumentError, UnsupportedError
from farlight.nn.attention import SparseAttention
from farlight.nn.masks import intersect
from farlight.patterns import causal, full, padding, pairs
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router

__all__ = ["scaled_dot_product_attention", "sparsify"]


def sparsify(module: nn.Module, pattern: Pattern | Router, **options: Any) -> nn.Module:
    """The module with every `nn.MultiheadAttention` in it replaced by `SparseAttention` under `pattern`, the same parameters.

    An `nn.MultiheadAttention` itself is returned as a new layer; any other module (an `nn.TransformerEncoder`, say) is changed
    in place and returned. Layers keep their `batch_first`. Encoders stop packing padded batches into nested tensors, which
    sparse attention does not read; padding masks go on working.

    options: of `SparseAttention`, such as `backend`.

    Raises ArgumentError for a module without `nn.MultiheadAttention`, and UnsupportedError for a layer with `add_bias_kv` or
    `add_zero_attn`, or that serves as cross-attention in an `nn.TransformerDecoderLayer`, whose two texts one pattern does not
    relate; the module is then unchanged.

    >>> import torch, farlight as fl
    >>> encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4), 2, enable_nested_tensor=False)
    >>> fl.nn.sparsify(encoder, fl.window(8))(torch.randn(50, 1, 32)).shape
    torch.Size([50, 1, 32])
    """
    if isinstance(module, nn.MultiheadAttention):
        return SparseAttention.from_dense(module, pattern, **options)
    found = [
        (owner, name, child)
        for owner in module.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.MultiheadAttention)
    ]
    if not found:
        raise ArgumentError(
            f"nn.sparsify: {type(module).__name__} holds no nn.MultiheadAttention; for a Hugging Face model use fl.hf.sparsify."
        )
    for owner, name, _ in found:
        if isinstance(owner, nn.TransformerDecoderLayer) and name == "multihead_attn":
            raise UnsupportedError(
                "nn.sparsify: the cross-attention of nn.TransformerDecoderLayer relates two texts, which one pattern does not; "
                "sparsify its self_attn: layer.self_attn = fl.nn.sparsify(layer.self_attn, pattern)."
            )
    # All are made before one is replaced: an error leaves the module as it was.
    layers = {id(child): SparseAttention.from_dense(child, pattern, **options) for _, _, child in found}
    for owner, name, child in found:
        setattr(owner, name, layers[id(child)])
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.enable_nested_tensor = encoder.use_nested_tensor = False
    return module


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | Pattern | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    pattern: Pattern | None = None,
    backend: str = "auto",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` over the pairs that `pattern` and the mask allow.

    Arguments, defaults and result are torch's, in torch's sense: a bool `attn_mask` `(…, n_q, n_k)` is True where a pair is
    allowed, an additive one 0 there and minus infinity elsewhere, and `is_causal` aligns the first query with the first key
    (with n_q < n_k the queries are then the *first* tokens; `fl.attention` aligns the last ones). A query that sees nothing
    gives 0. `attn_mask` may be a pattern; `pattern` narrows it, its positions counted as torch counts: query i at position i.

    query `(B, H, n_q, D)`, or without B; key and value `(B, H_kv, n_k, D)`, fewer heads with `enable_gqa`.

    Raises ArgumentError for a mask of another shape or dtype, UnsupportedError for a mask that adds other numbers (a bias: see
    `fl.score`).

    >>> import torch, farlight as fl
    >>> q = torch.randn(1, 2, 40, 8)
    >>> narrow = fl.nn.scaled_dot_product_attention(q, q, q, is_causal=True, pattern=fl.window(4))
    >>> torch.equal(narrow, fl.attention(q, q, q, fl.causal() & fl.window(4)))
    True
    """
    if query.dim() == 3:
        mask = attn_mask[None] if isinstance(attn_mask, Tensor) and attn_mask.dim() == 3 else attn_mask
        options: dict[str, Any] = {"pattern": pattern, "backend": backend}
        q, k, v = query[None], key[None], value[None]
        return scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, **options)[0]
    if not enable_gqa and query.dim() == 4 and key.dim() == 4 and key.shape[1] != query.shape[1]:
        raise ArgumentError(
            f"scaled_dot_product_attention: {query.shape[1]} query heads, {key.shape[1]} of keys; pass enable_gqa=True."
        )
    if is_causal and attn_mask is not None:
        raise ArgumentError("scaled_dot_product_attention: pass attn_mask or is_causal=True, not both, as in torch.")
    allowed = full() if pattern is None else pattern
    if is_causal:
        allowed = intersect(allowed, causal())
    elif isinstance(attn_mask, Pattern):
        allowed = intersect(allowed, attn_mask)
    elif attn_mask is not None:
        allowed = intersect(allowed, _mask_of(attn_mask, query, key))
    out = attention(query, key, value, allowed, scale=scale, dropout=dropout_p, q_offset=0, backend=backend)
    assert isinstance(out, Tensor)
    return out


def _mask_of(mask: Tensor, query: Tensor, key: Tensor) -> Pattern:
    """The pattern of torch's `attn_mask`, broadcast to `(B|1, H|1, n_q, n_k)`."""
    name = "scaled_dot_product_attention: attn_mask"
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        kind = f"of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(f"{name} is {kind}; pass bool (True = allowed), or 0 and minus infinity.")
    if mask.dtype != torch.bool:
        allowed = mask == 0
        if not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            raise UnsupportedError(
                f"{name} adds numbers other than 0 and minus infinity: a bias, which a pattern cannot express; see fl.score."
            )
        mask = allowed
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(m not in (1, n) for m, n in zip(shape, sizes, strict=True)):
        raise ArgumentError(f"{name} has shape {tuple(mask.shape)}, which does not broadcast to {sizes}.")
    mask = mask.reshape(shape)
    if mask.shape[1] == mask.shape[2] == 1:
        return padding(mask.expand(mask.shape[0], 1, 1, sizes[3])[:, 0, 0])
    return pairs(mask.expand(*mask.shape[:2], *sizes[2:]))
