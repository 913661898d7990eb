"""Longformer and the encoder of LED: the same parameters and numbers as Hugging Face's modules, without their chunks.

With roles *local*, *global* and *padding* of the tokens, w = attention_window / 2 and q, k, v the layer's projections:

    out[i] = Σ_j softmax_j(q[i]·k[j] / √D) v[j]    over j real and (|i - j| <= w or j global)       i local
    out[i] = the same with the separate q_global, k_global, v_global, over all real j               i global
    out[i] = 0                                                                                      i padding

Beltagy, Peters & Cohan 2020, "Longformer: The Long-Document Transformer", arXiv:2004.05150. The dilated and the
autoregressive mode of that paper, which Hugging Face's modules do not have, are options here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import farlight
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.swap import (
    Reference,
    Replacement,
    assign,
    children,
    class_of,
    common,
    heads_apart,
    heads_joined,
    in_use,
    refuse_attentions,
    restore,
)
from farlight.hf.tracing import refuse_jit_trace
from farlight.patterns import causal, full, padding, per_head, seen_by_all, sees_all, window
from farlight.patterns.expression import Pattern

__all__ = ["LongformerAttention", "replaces", "restore", "sparsify"]

_KINDS = (
    ("longformer.modeling_longformer", "LongformerSelfAttention", "LongformerModel"),
    ("led.modeling_led", "LEDEncoderSelfAttention", "LEDEncoder"),
)

Dilation = int | Sequence[int] | Sequence[Sequence[int]]


def replaces(model: nn.Module) -> bool:
    """Whether the model holds self-attention of Longformer or of LED's encoder (Hugging Face's or, already, farlight's)."""
    own = (class_of(file, attention) for file, attention, _ in _KINDS)
    return in_use(model, LongformerAttention) or any(next(children(model, kind), None) for kind in own)


def sparsify(model: Any, *, autoregressive: bool = False, dilation: Dilation = 1, backend: str = "auto") -> Any:
    """Replace the self-attention of a Longformer, or of LED's encoder, by farlight's; the model is changed and returned.

    Parameters, state dict and outputs stay what they are; `restore(model)` undoes it. Any task head works, training
    included, and a sequence is no longer padded to a multiple of the window. Calling it again changes the options.

    Args:
        model: a transformers model (or a part of one) with `LongformerSelfAttention` or `LEDEncoderSelfAttention` modules.
        autoregressive: a token sees only j <= i, global tokens too.
        dilation: gaps in the window: distances up to w·d that d divides. One number, one for each layer, or for each layer
            one for each head.
        backend: as in `fl.attention`.

    Raises:
        UnsupportedError: the model holds no such attention. ArgumentError: `dilation` does not fit the layers or heads.

    >>> import torch, farlight.hf.longformer
    >>> from transformers import LongformerConfig, LongformerModel
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    >>> model = LongformerModel(LongformerConfig(attention_window=4, **sizes)).eval()
    >>> ids = torch.arange(2, 9)[None]
    >>> before = model(ids).last_hidden_state
    >>> after = farlight.hf.longformer.sparsify(model)(ids).last_hidden_state
    >>> torch.allclose(before, after, atol=1e-6)
    True
    """
    restore(model)
    found = [place for file, attention, _ in _KINDS for place in children(model, class_of(file, attention))]
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} holds no self-attention of Longformer or of LED's encoder; for other models use "
            "fl.hf.sparsify."
        )
    roles = _Memo()
    windows = _windows([child for _, _, child in found], dilation)
    for (parent, name, child), near in zip(found, windows, strict=True):
        setattr(parent, name, LongformerAttention(child, near, autoregressive, backend, roles))
    for file, _, wrapper in _KINDS:
        kind = class_of(file, wrapper)
        for owner in [module for module in model.modules() if kind is not None and isinstance(module, kind)]:
            assign(owner, owner, "_pad_to_window_size", _unpadded if wrapper == "LongformerModel" else _unpadded_led)
    return model


class LongformerAttention(Replacement):
    """In the place of one `LongformerSelfAttention` or `LEDEncoderSelfAttention`; called as they are.

    `near` is the window without globals and padding; see the head of this file for what is computed.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_global: nn.Module
    key_global: nn.Module
    value_global: nn.Module

    def __init__(
        self, original: nn.Module, near: Pattern, autoregressive: bool = False, backend: str = "auto", roles: Any = None
    ) -> None:
        super().__init__(original)
        self.num_heads: int = original.num_heads  # type: ignore[assignment]
        self.dropout: float = original.dropout  # type: ignore[assignment]
        self.near, self.autoregressive, self.backend = near, autoregressive, backend
        self._roles: _Memo = _Memo() if roles is None else roles

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor]:
        """`(B, N, E)` to `(B, N, E)`; the masks are those that the encoder prepares (the sign of `attention_mask` counts)."""
        refuse_jit_trace(self)
        refuse_attentions(self, output_attentions)
        for mask in (attention_mask, is_index_masked, is_index_global_attn):
            if mask is not None and mask.shape != hidden_states.shape[:2]:
                raise UnsupportedError(
                    f"{type(self).__name__} was given a mask of shape {tuple(mask.shape)} for hidden states of shape "
                    f"{tuple(hidden_states.shape)}; pass the model masks of shape {tuple(hidden_states.shape[:2])}, one row "
                    "for each text."
                )
        roles = self._roles(attention_mask, is_index_masked, is_index_global_attn, is_global_attn)
        q, k, v = (heads_apart(f(hidden_states), self.num_heads) for f in (self.query, self.key, self.value))
        out = heads_joined(self._attend(q, k, v, roles.local(self.near, self.autoregressive)))
        if roles.index is None:
            return (out,)
        # Rows of global tokens are 0 so far, so that adding is overwriting.
        index = roles.index[:, :, None].expand(-1, -1, hidden_states.shape[2])
        q = self.query_global(hidden_states.gather(1, index))
        k, v = (heads_apart(f(hidden_states), self.num_heads) for f in (self.key_global, self.value_global))
        if self.autoregressive:
            # Where a query stands matters: each goes back to its place.
            q = torch.zeros_like(hidden_states, dtype=q.dtype).scatter_add(1, index, roles.blanked(q))
            return (out + heads_joined(self._attend(heads_apart(q, self.num_heads), k, v, roles.backward_looking())),)
        seen = heads_joined(self._attend(heads_apart(q, self.num_heads), k, v, roles.real()))
        return (out.scatter_add(1, index, roles.blanked(seen)),)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        out = farlight.attention(q, k, v, pattern, dropout=dropout, backend=self.backend)
        assert isinstance(out, Tensor)
        return out


class _Roles:
    """Which tokens are padding and which are global, in one batch; the patterns are shared by all layers."""

    def __init__(self, masked: Tensor | None, is_global: Tensor | None) -> None:
        self.masked = None if masked is None or not bool(masked.any()) else common(masked)
        self.index: Tensor | None = None
        self.used: Tensor | None = None
        self.is_global = None if is_global is None or not bool(is_global.any()) else common(is_global)
        self._local: dict[tuple[Pattern, bool], Pattern] = {}
        if is_global is not None and self.is_global is not None:
            count = is_global.sum(1)
            most = int(count.max())
            # Positions of the global tokens, those with fewer filled up by others, which `blanked` leaves out.
            self.index = is_global.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
            used = torch.arange(most, device=count.device) < count[:, None]
            self.used = None if bool(used.all()) else used

    def local(self, near: Pattern, autoregressive: bool) -> Pattern:
        """Links of the local tokens. A set: a global token inside the window counts once."""
        key = (near, autoregressive)
        if key not in self._local:
            pattern = near if self.masked is None else near & padding(~self.masked)
            if self.is_global is not None:
                pattern = pattern | seen_by_all(self.is_global)
            if autoregressive:
                pattern = causal() & pattern
            for others in (self.masked, self.is_global):
                if others is not None:
                    pattern = pattern - sees_all(others)
            self._local[key] = pattern
        return self._local[key]

    def real(self) -> Pattern:
        return full() if self.masked is None else padding(~self.masked)

    def backward_looking(self) -> Pattern:
        """Links of the global tokens that lie in the past."""
        assert self.is_global is not None
        return causal() & self.real() & sees_all(self.is_global)

    def blanked(self, rows: Tensor) -> Tensor:
        """`(B, G, …)` rows of global tokens, 0 where an item has fewer."""
        return rows if self.used is None else torch.where(self.used[:, :, None], rows, 0.0)


class _Memo:
    """The roles of the batch at hand: every layer of a model is given the same two masks."""

    def __init__(self) -> None:
        self._last: tuple[Reference, Reference, _Roles] | None = None

    def __reduce__(self) -> tuple[type[_Memo], tuple[()]]:
        return _Memo, ()

    def __call__(self, mask: Tensor | None, masked: Tensor | None, is_global: Tensor | None, any_global: bool | None) -> _Roles:
        if mask is not None:
            masked = mask < 0 if masked is None else masked
            is_global = mask > 0 if is_global is None else is_global
        if any_global is False:
            is_global = None
        last = self._last
        if last is not None and last[0].is_still(masked) and last[1].is_still(is_global):
            return last[2]
        roles = _Roles(masked, is_global)
        self._last = (Reference(masked), Reference(is_global), roles)
        return roles


def _windows(modules: Sequence[Any], dilation: Dilation) -> list[Pattern]:
    """The window of each layer, with its gaps."""
    gaps: list[int | Sequence[int]] = [dilation] * len(modules) if isinstance(dilation, int) else list(dilation)
    if len(gaps) != len(modules):
        raise ArgumentError(
            f"dilation has {len(gaps)} entries, but the model has {len(modules)} layers with Longformer attention; give one "
            "number for all, or one entry for each layer."
        )
    out: list[Pattern] = []
    for layer, (module, gap) in enumerate(zip(modules, gaps, strict=True)):
        width = module.one_sided_attn_window_size
        if isinstance(gap, int):
            out.append(window(width, dilation=gap))
            continue
        each = list(gap)
        if len(each) != module.num_heads:
            raise ArgumentError(
                f"dilation: layer {layer} has {len(each)} entries for {module.num_heads} heads; give one number for the "
                "layer, or one for each head."
            )
        out.append(per_head([window(width, dilation=d) for d in each]))
    return out


def _unpadded(
    input_ids: Any, attention_mask: Any, token_type_ids: Any, position_ids: Any, inputs_embeds: Any, pad_token_id: int
) -> tuple[Any, ...]:
    """In the place of `LongformerModel._pad_to_window_size`: no padding is needed."""
    return 0, input_ids, attention_mask.as_subclass(_OneRow), token_type_ids, position_ids, inputs_embeds


def _unpadded_led(input_ids: Any, attention_mask: Any, inputs_embeds: Any, pad_token_id: int) -> tuple[Any, ...]:
    """In the place of `LEDEncoder._pad_to_window_size`."""
    return 0, input_ids, attention_mask.as_subclass(_OneRow), inputs_embeds


class _OneRow(Tensor):
    """A mask `(B, N)` that stays one row. Both models build an additive mask of N equal rows, and read the first.

    LED's encoder repeats the mask N times. LongformerModel clamps it to 0 and 1 and asks transformers for a mask of four
    dimensions, which is passed on where it has them already.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.expand:
                return args[0].as_subclass(Tensor)
            if func is torch.clamp:
                row = args[0].as_subclass(Tensor)[:, None, None, :]
                return torch.zeros(row.shape, device=row.device).masked_fill_(row <= 0, torch.finfo(torch.float32).min)
        return super().__torch_function__(func, types, args, kwargs or {})
