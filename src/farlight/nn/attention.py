"""`SparseAttention`: `nn.MultiheadAttention` over the pairs that a pattern or a router allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from farlight import ops
from farlight.attention import attention
from farlight.errors import ArgumentError, UnsupportedError, show
from farlight.inputs import without_autocast
from farlight.kernels import registry
from farlight.nn.masks import intersect, mask_pattern, real_keys, without_padding
from farlight.nn.positions import RotaryPositions, Rotation, read_rotary
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router

__all__ = ["SparseAttention"]

# Elements up to which `need_weights=True` materialises the weights: 1 GiB of float32.
_MAX_WEIGHTS = 1 << 28


class SparseAttention(nn.Module):
    """Multi-head attention over the pairs that a pattern allows: a drop-in for `nn.MultiheadAttention`.

        out = concat_h(softmax_{j allowed}(scale · q_h k_hᵀ) v_h) W_oᵀ + b_o,    q, k, v = x W_inᵀ + b_in

    The call, the result and the names in the state dict are those of nn.MultiheadAttention, so weights of one load into the
    other. Differences: `need_weights` is False by default (weights are an n² matrix), and a query that sees nothing gives the
    bias of the output projection, not NaN.

    Args:
        embed_dim, num_heads: as in torch; heads have `embed_dim // num_heads` dimensions.
        pattern: the allowed pairs, or a `fl.routing.Router`, which chooses them in each call from queries and keys.
        kv_heads: fewer heads of keys and values (grouped-query attention), a divisor of num_heads.
        bias, dropout, kdim, vdim, device, dtype: as in torch. Dropout removes links, in training mode.
        rotary: True, a `RotaryPositions` (which layers may share) or any function of (tensor `(B, H, N, D)`, positions
            `(N,)`), applied to queries and keys.
        route_before_rotary: pass a router the queries and keys before the rotation, so that it clusters by content alone.
            By default it receives what attention compares.
        backend: as in `fl.attention`.
        batch_first: False: inputs and out are `(tokens, batch, dim)`, as torch's default.

    Masks as in torch: `key_padding_mask` `(B, n_k)`, True (or -inf) = ignore this key; `attn_mask` `(n_q, n_k)` or
    `(B · H, n_q, n_k)`, True (or -inf) = forbidden. Both narrow the pattern. `attn_mask` may also be a pattern, such as
    `fl.documents(ids)`, and `is_causal=True` needs no mask beside it. Positions are counted as in `fl.attention`: the queries
    are the last tokens of the keys' text unless `q_offset` says otherwise (for two texts, say `q_offset=0`).

    Raises:
        ArgumentError: an argument cannot be used. UnsupportedError: a mask that adds a bias; weights of more than 2^28
        pairs; nested tensors.

    >>> import torch, farlight as fl
    >>> layer = fl.nn.SparseAttention(32, 4, fl.window(8) | fl.global_tokens([0]))
    >>> x = torch.randn(2, 100, 32)
    >>> out, weights = layer(x, x, x)
    >>> out.shape, weights
    (torch.Size([2, 100, 32]), None)
    """

    # Read by torch's own encoder layers: were it True, they would take the weights in evaluation and compute full attention
    # without calling this module.
    _qkv_same_embed_dim = False
    pattern: Pattern | Router
    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: Pattern | Router,
        *,
        kv_heads: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        rotary: RotaryPositions | Rotation | bool | None = None,
        route_before_rotary: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        backend: str = "auto",
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.batch_first = bool(batch_first)
        name = "SparseAttention"
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads = whole(f"{name}: embed_dim", embed_dim, 1), whole(f"{name}: num_heads", num_heads, 1)
        self.kv_heads = self.num_heads if kv_heads is None else whole(f"{name}: kv_heads", kv_heads, 1)
        if self.embed_dim % self.num_heads or self.num_heads % self.kv_heads:
            raise ArgumentError(
                f"{name}: embed_dim = {embed_dim}, num_heads = {num_heads}, kv_heads = {self.kv_heads}: each must be a "
                "multiple of the next."
            )
        if not isinstance(pattern, Pattern | Router):
            raise ArgumentError(
                f"{name}: the pattern is {type(pattern).__name__}; pass a pattern such as fl.window(256), or a router of "
                "fl.routing."
            )
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout <= 1.0:
            raise ArgumentError(f"{name}: dropout = {show(dropout)}: it is a share of links and must lie in 0 <= dropout <= 1.")
        registry.check_name(backend)
        self.head_dim, self.dropout, self.backend = self.embed_dim // self.num_heads, float(dropout), backend
        self.kdim, self.vdim = (self.embed_dim if d is None else whole(f"{name}: kdim, vdim", d, 1) for d in (kdim, vdim))
        self.rotary = read_rotary(name, rotary, self.head_dim)
        self.route_before_rotary, self.pattern = bool(route_before_rotary), pattern
        kv_width = self.kv_heads * self.head_dim
        shapes = {"q": (self.embed_dim, self.embed_dim), "k": (kv_width, self.kdim), "v": (kv_width, self.vdim)}
        if self.kdim == self.vdim == self.embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty(self.embed_dim + 2 * kv_width, self.embed_dim, **factory_kwargs))
        else:
            self.register_parameter("in_proj_weight", None)
        for part, shape in shapes.items():
            weight = None if self.in_proj_weight is not None else nn.Parameter(torch.empty(shape, **factory_kwargs))
            self.register_parameter(f"{part}_proj_weight", weight)
        in_bias = nn.Parameter(torch.empty(self.embed_dim + 2 * kv_width, **factory_kwargs)) if bias else None
        self.register_parameter("in_proj_bias", in_bias)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=bias, **factory_kwargs)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, module: nn.MultiheadAttention, pattern: Pattern | Router, **options: Any) -> SparseAttention:
        """A sparse layer that shares the parameters of a dense one.

        `options` are those of SparseAttention. Raises UnsupportedError for `add_bias_kv` and `add_zero_attn`.

        >>> import torch, farlight as fl
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> layer.self_attn = fl.nn.SparseAttention.from_dense(layer.self_attn, fl.window(8))
        >>> layer(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise ArgumentError(f"from_dense: {type(module).__name__} is not an nn.MultiheadAttention; pass one.")
        for present, what in (
            (module.bias_k is not None, "add_bias_kv: a learned key that stands in no text; build it without"),
            (module.add_zero_attn, "add_zero_attn: a zero key that stands in no text; build it without"),
        ):
            if present:
                raise UnsupportedError(f"from_dense: the layer has {what}.")
        options = {
            "bias": module.in_proj_bias is not None,
            "dropout": module.dropout,
            "kdim": module.kdim,
            "vdim": module.vdim,
            "batch_first": module.batch_first,
        } | options
        layer = cls(module.embed_dim, module.num_heads, pattern, device="meta", **options)
        if layer.kv_heads != layer.num_heads:
            raise UnsupportedError(f"from_dense: kv_heads = {layer.kv_heads} needs other weights than the dense layer has.")
        for name, parameter in module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(owner), leaf, parameter)
        return layer.train(module.training)

    def reset_parameters(self) -> None:
        """The initialisation of nn.MultiheadAttention: Xavier for the input projections, zeros for the biases."""
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(self, name) is not None:
                nn.init.xavier_uniform_(getattr(self, name))
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        shown = "" if isinstance(self.pattern, Router) else f", {self.pattern!r}"
        groups = f", kv_heads={self.kv_heads}" if self.kv_heads != self.num_heads else ""
        return f"{self.embed_dim}, {self.num_heads}{shown if len(shown) < 200 else shown[:199] + '…'}{groups}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | Pattern | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        q_offset: int | None = None,
        chosen: list[Pattern] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`(out, weights)`: out `(B, n_q, embed_dim)`; weights None or, with `need_weights`, `(B, n_q, n_k)` before dropout
        (`(B, H, n_q, n_k)` when not averaged). Inputs `(B, n, dim)`, or `(n, dim)` for a single text.

        `chosen` stores a router's pattern: an empty list is filled; the pattern of a filled one is used without calling the
        router, so that a recomputed forward pass attends over the same links.
        """
        if query.dim() == 2 and key.dim() == value.dim() == 2:
            batch_dim = 0 if self.batch_first else 1
            out, weights = self.forward(
                query.unsqueeze(batch_dim),
                key.unsqueeze(batch_dim),
                value.unsqueeze(batch_dim),
                None if key_padding_mask is None else key_padding_mask[None],
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
                q_offset=q_offset,
                chosen=chosen,
            )
            return out.squeeze(0 if self.batch_first else 1), None if weights is None else weights[0]
        if not self.batch_first:
            query, key, value = _transposed(query, key, value)
        self._check_inputs(query, key, value)
        batch, n_q, n_k = query.shape[0], query.shape[1], key.shape[1]
        offset = n_k - n_q if q_offset is None else q_offset
        real = real_keys("SparseAttention", key_padding_mask, batch, n_k)
        allowed = mask_pattern("SparseAttention", attn_mask, is_causal, batch, self.num_heads, n_q, n_k, offset)
        q, k, v = self._project(query, key, value)
        content_q, content_k = q, k
        if self.rotary is not None:
            q, k = self._rotate(self.rotary, q, k, offset)
        if isinstance(self.pattern, Router):
            routed = (content_q, content_k) if self.route_before_rotary else (q, k)
            pattern = self._route(*routed, real, query is key, offset, chosen)
        else:
            pattern = without_padding(self.pattern, real)
        pattern = intersect(pattern, allowed)
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"q_offset": offset, "dropout": dropout, "backend": self.backend}
        if not need_weights:
            return self._project_out(attention(q, k, v, pattern, **options)), None
        if batch * self.num_heads * n_q * n_k > _MAX_WEIGHTS:
            raise UnsupportedError(
                f"SparseAttention: need_weights=True for {batch} x {self.num_heads} x {n_q} x {n_k} pairs would form "
                f"{batch * self.num_heads * n_q * n_k / 2**28:.1f} GiB; pass a shorter text, or see fl.retention."
            )
        out, lse = attention(q, k, v, pattern, return_lse=True, **options)
        weights = self._weights(q, k, lse, pattern, offset)
        return self._project_out(out), weights.mean(1) if average_attn_weights else weights

    if TYPE_CHECKING:
        __call__ = forward

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, x, dim in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.is_nested:
                raise UnsupportedError(
                    f"SparseAttention: {name} is a nested tensor, which is not supported. Build nn.TransformerEncoder with "
                    "enable_nested_tensor=False, or pass padded tensors with a key_padding_mask."
                )
            if x.dim() != 3 or x.shape[2] != dim:
                raise ArgumentError(f"SparseAttention: {name} is {tuple(x.shape)}; (batch, tokens, {dim}) is needed.")
        if key.shape[:2] != value.shape[:2] or key.shape[0] != query.shape[0]:
            raise ArgumentError(
                f"SparseAttention: query is {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: the "
                "batch must be the same in all, and the number of tokens in key and value."
            )

    def _rotate(self, rotary: Rotation, q: Tensor, k: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """q and k rotated by their positions, the first query at `offset` and the first key at 0."""
        key_positions = torch.arange(k.shape[2], device=k.device)
        one_range = q.shape[2] == k.shape[2] and offset == 0
        query_positions = key_positions if one_range else torch.arange(q.shape[2], device=q.device) + offset
        return rotary(q, query_positions), rotary(k, key_positions)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `(B, H|H_kv, N, D)`, views of the projections' outputs."""
        widths = [self.embed_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        if self.in_proj_weight is not None and query is key and key is value:
            parts = functional.linear(query, self.in_proj_weight, self.in_proj_bias).split(widths, -1)
        else:
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.split(widths)
            else:
                weights = tuple(getattr(self, f"{part}_proj_weight") for part in "qkv")
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.split(widths)
            projections = zip((query, key, value), weights, biases, strict=True)
            parts = tuple(functional.linear(x, weight, bias) for x, weight, bias in projections)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in parts)
        return q, k, v

    def _route(
        self, q: Tensor, k: Tensor, real: Tensor | None, one_text: bool, offset: int, chosen: list[Pattern] | None
    ) -> Pattern:
        """The router's pattern without padding, from a call or from `chosen`. Raises where queries are not the last tokens."""
        if offset != k.shape[2] - q.shape[2]:
            raise UnsupportedError(
                f"SparseAttention: a router takes the queries as the last tokens of the keys' text, but q_offset = {offset} "
                f"for {q.shape[2]} queries and {k.shape[2]} keys; leave q_offset out."
            )
        if chosen:
            return without_padding(chosen[0], real)
        # Padded queries of the same text choose nothing; the mask says nothing of the queries of another text.
        query_real = None if one_text or real is None else real.new_ones(q.shape[0], q.shape[2])
        pattern: Pattern = self.pattern(q, k, key_mask=real, query_mask=query_real)  # type: ignore[operator]
        if chosen is not None:
            chosen.append(pattern)
        return without_padding(pattern, real)

    def _project_out(self, out: Tensor) -> Tensor:
        """`(B, H, N, D)` to `(B, N, embed_dim)`, `(N, B, embed_dim)` unless batch_first."""
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected if self.batch_first else projected.transpose(0, 1)

    def _weights(self, q: Tensor, k: Tensor, lse: Tensor, pattern: Pattern, offset: int) -> Tensor:
        """`(B, H, n_q, n_k)` exp(score - lse) over the allowed pairs; 0 elsewhere, and in rows that see nothing."""
        if not q.shape[0]:
            return lse.new_zeros(*q.shape[:3], k.shape[2])
        sizes = (q.shape[2], k.shape[2], offset, q.shape[0], q.shape[1])
        mask = ops.pattern_mask(q, list(pattern._tables), pattern.text, *sizes)
        k = k.repeat_interleave(self.num_heads // self.kv_heads, 1)
        with without_autocast(q):
            scores = (q.to(lse.dtype) * self.head_dim**-0.5) @ k.to(lse.dtype).transpose(-1, -2)
        norm = torch.where(lse == float("-inf"), 0.0, lse)
        weights: Tensor = (scores - norm[..., None]).masked_fill(~mask, float("-inf")).exp()
        return weights


def _transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch and tokens exchanged; tensors that are one object stay one, so that one projection serves them."""
    q, k, v = (x.transpose(0, 1) if not x.is_nested and x.dim() == 3 else x for x in (query, key, value))
    return q, q if key is query else k, q if value is query else v
