"""Longformer and the encoder of LED: farlight's attention with the parameters and outputs of Hugging Face's modules.

With roles *local*, *global* and *padding* of the tokens, w = attention_window / 2 and q, k, v the layer's projections:

    out[i] = Σ_j softmax_j(q[i]·k[j] / √D) v[j]    over j real and (|i - j| <= w or j global)       i local
    out[i] = the same with the separate q_global, k_global, v_global, over all real j               i global
    out[i] = 0                                                                                      i padding

Local rows and global rows are two attention calls; the global rows are gathered first, and scattered into the output.
Hugging Face's modules chunk and pad the text instead.

Beltagy, Peters & Cohan 2020, "Longformer: The Long-Document Transformer", arXiv:2004.05150. The dilated and the
autoregressive mode of that paper, which Hugging Face's modules do not have, are options here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from farlight.attention import attention
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.longformer_probabilities import global_probabilities, local_probabilities
from farlight.hf.probabilities import check_length
from farlight.hf.swap import (
    Replacement,
    TensorVersion,
    children,
    collapse_batch,
    contains,
    loaded_class,
    merge_heads,
    restore,
    set_attribute,
    split_heads,
)
from farlight.hf.tracing import refuse_jit_trace
from farlight.patterns import causal, full, padding, per_head, seen_by_all, sees_all, window
from farlight.patterns.expression import Pattern

__all__ = ["LongformerAttention", "replaces", "restore", "sparsify"]

# (file, class of the attention module, class of the model or encoder around it)
_CLASSES = (
    ("longformer.modeling_longformer", "LongformerSelfAttention", "LongformerModel"),
    ("led.modeling_led", "LEDEncoderSelfAttention", "LEDEncoder"),
)

# One number, one for each layer, or for each layer one for each head.
Dilation = int | Sequence[int] | Sequence[Sequence[int]]


def replaces(model: nn.Module) -> bool:
    """Whether the model contains self-attention of Longformer or of LED's encoder (Hugging Face's, or farlight's already)."""
    classes = (loaded_class(file, cls) for file, cls, _ in _CLASSES)
    return contains(model, LongformerAttention) or any(next(children(model, cls), None) for cls in classes)


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
    sites = [site for file, cls, _ in _CLASSES for site in children(model, loaded_class(file, cls))]
    if not sites:
        raise UnsupportedError(
            f"{type(model).__name__} holds no self-attention of Longformer or of LED's encoder; for other models use "
            "fl.hf.sparsify."
        )
    roles = _RolesCache()
    windows = _windows([child for _, _, child in sites], dilation)
    for (parent, name, child), window_pattern in zip(sites, windows, strict=True):
        setattr(parent, name, LongformerAttention(child, window_pattern, autoregressive, backend, roles))
    for file, _, wrapper in _CLASSES:
        cls = loaded_class(file, wrapper)
        for owner in [module for module in model.modules() if cls is not None and isinstance(module, cls)]:
            set_attribute(
                owner, owner, "_pad_to_window_size", _keep_length if wrapper == "LongformerModel" else _keep_length_led
            )
    return model


class LongformerAttention(Replacement):
    """Replaces one `LongformerSelfAttention` or `LEDEncoderSelfAttention`, with the same call; see the module docstring.

    Args:
        original: the replaced module.
        window_pattern: the window alone, without global tokens and padding.
        autoregressive: global and local tokens see only j <= i.
        backend: as in `fl.attention`.
        roles: shared by the layers of a model, so that masks are read once.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_global: nn.Module
    key_global: nn.Module
    value_global: nn.Module

    def __init__(
        self,
        original: nn.Module,
        window_pattern: Pattern,
        autoregressive: bool = False,
        backend: str = "auto",
        roles: Any = None,
    ) -> None:
        super().__init__(original)
        self.num_heads: int = original.num_heads  # type: ignore[assignment]
        self.dropout: float = original.dropout  # type: ignore[assignment]
        self.window_pattern, self.autoregressive, self.backend = window_pattern, autoregressive, backend
        self._roles: _RolesCache = _RolesCache() if roles is None else roles

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """`(B, N, E)` to `(B, N, E)`; masks `(B, N)` as the encoder prepares them.

        `attention_mask`: negative = padding, 0 = local, positive = global. Under `output_attentions` the probabilities follow,
        as `longformer_probabilities` lays them out. Raises UnsupportedError for other shapes, and for those of long texts.
        """
        refuse_jit_trace(self)
        if output_attentions:
            check_length(self, *hidden_states.shape[1:2] * 2)
        for mask in (attention_mask, is_index_masked, is_index_global_attn):
            if mask is not None and mask.shape != hidden_states.shape[:2]:
                raise UnsupportedError(
                    f"{type(self).__name__} was given a mask of shape {tuple(mask.shape)} for hidden states of shape "
                    f"{tuple(hidden_states.shape)}; pass the model masks of shape {tuple(hidden_states.shape[:2])}, one row "
                    "for each text."
                )
        roles = self._roles(attention_mask, is_index_masked, is_index_global_attn, is_global_attn)
        if output_attentions and roles.is_global is not None and roles.index is None:
            raise UnsupportedError(
                "output_attentions=True in a compiled or exported program: the number of columns is that of the global tokens, "
                "which is not known there; call the model itself for the probabilities."
            )
        q, k, v = (split_heads(f(hidden_states), self.num_heads) for f in (self.query, self.key, self.value))
        pattern = roles.local(self.window_pattern, self.autoregressive)
        out = merge_heads(self._attend(q, k, v, pattern))
        weights: tuple[Tensor, ...] = ()
        if output_attentions:
            weights = (local_probabilities(q, k, pattern, self.window_pattern, roles.is_global, roles.index, roles.used),)
        if roles.is_global is None:
            return (out, *weights)
        k, v = (split_heads(f(hidden_states), self.num_heads) for f in (self.key_global, self.value_global))
        if self.autoregressive or roles.index is None:
            # Causality needs the positions of the queries, and a traced program does not know how many there are.
            q, rows = split_heads(self.query_global(hidden_states), self.num_heads), roles.global_rows(self.autoregressive)
            out = out + merge_heads(self._attend(q, k, v, rows))
            if output_attentions:
                weights += (global_probabilities(q, k, rows, roles.index, roles.used),)
            return (out, *weights)
        # The rows of global tokens are 0, so scatter_add writes them.
        index = roles.index[:, :, None].expand(-1, -1, hidden_states.shape[2])
        q = split_heads(self.query_global(hidden_states.gather(1, index)), self.num_heads)
        out = out.scatter_add(1, index, roles.zero_fill(merge_heads(self._attend(q, k, v, roles.real()))))
        if output_attentions:
            weights += (global_probabilities(q, k, roles.real(), None, roles.used),)
        return (out, *weights)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        out = attention(q, k, v, pattern, dropout=dropout, backend=self.backend)
        assert isinstance(out, Tensor)
        return out


class _TokenRoles:
    """The roles of the tokens of one batch, and the patterns made from them; shared by all layers.

    Attributes:
        masked, is_global: `(B|1, N)` bool; None where no token is padding, or global.
        index: `(B, G)` int64, positions of the global tokens, G the largest number of them in a text; shorter rows are filled
            up with other positions. None where no token is global, or G is unknown (in a traced program).
        used: `(B, G)` bool, False for the fill; None where there is none.
    """

    def __init__(self, masked: Tensor | None, is_global: Tensor | None) -> None:
        traced = torch.compiler.is_compiling()
        self.masked = collapse_batch(masked) if masked is not None and (traced or bool(masked.any())) else None
        self.is_global = collapse_batch(is_global) if is_global is not None and (traced or bool(is_global.any())) else None
        self.index: Tensor | None = None
        self.used: Tensor | None = None
        self._local: dict[tuple[Pattern, bool], Pattern] = {}
        if is_global is not None and self.is_global is not None and not traced:
            count = is_global.sum(1)
            max_count = int(count.max())
            self.index = is_global.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :max_count]
            used = torch.arange(max_count, device=count.device) < count[:, None]
            self.used = None if bool(used.all()) else used

    def local(self, window_pattern: Pattern, autoregressive: bool) -> Pattern:
        """The allowed pairs of the local rows. A set: a global token inside the window counts once."""
        key = (window_pattern, autoregressive)
        if key not in self._local:
            pattern = window_pattern if self.masked is None else window_pattern & padding(~self.masked)
            if self.is_global is not None:
                pattern = pattern | seen_by_all(self.is_global)
            if autoregressive:
                pattern = causal() & pattern
            for rows in (self.masked, self.is_global):
                if rows is not None:
                    pattern = pattern - sees_all(rows)
            self._local[key] = pattern
        return self._local[key]

    def real(self) -> Pattern:
        """All pairs with a real key."""
        return full() if self.masked is None else padding(~self.masked)

    def global_rows(self, autoregressive: bool) -> Pattern:
        """The allowed pairs of the global rows; no other row sees a key."""
        assert self.is_global is not None
        pattern = self.real() & sees_all(self.is_global)
        return causal() & pattern if autoregressive else pattern

    def zero_fill(self, rows: Tensor) -> Tensor:
        """`(B, G, …)` rows of global tokens, with 0 in the fill of texts that have fewer."""
        return rows if self.used is None else torch.where(self.used[:, :, None], rows, 0.0)


class _RolesCache:
    """The roles of the latest batch: every layer of a model receives the same two masks. Copies start empty."""

    def __init__(self) -> None:
        self._last: tuple[TensorVersion, TensorVersion, _TokenRoles] | None = None

    def __reduce__(self) -> tuple[type[_RolesCache], tuple[()]]:
        return _RolesCache, ()

    def __call__(
        self, mask: Tensor | None, masked: Tensor | None, is_global: Tensor | None, any_global: bool | None
    ) -> _TokenRoles:
        if mask is not None:
            masked = mask < 0 if masked is None else masked
            is_global = mask > 0 if is_global is None else is_global
        if any_global is False:
            is_global = None
        if torch.compiler.is_compiling():
            return _TokenRoles(masked, is_global)
        last = self._last
        if last is not None and last[0].is_unchanged(masked) and last[1].is_unchanged(is_global):
            return last[2]
        roles = _TokenRoles(masked, is_global)
        self._last = (TensorVersion(masked), TensorVersion(is_global), roles)
        return roles


def _windows(modules: Sequence[Any], dilation: Dilation) -> list[Pattern]:
    """The dilated window of each layer. Raises ArgumentError where `dilation` does not fit the layers or heads."""
    by_layer: list[int | Sequence[int]] = [dilation] * len(modules) if isinstance(dilation, int) else list(dilation)
    if len(by_layer) != len(modules):
        raise ArgumentError(
            f"dilation has {len(by_layer)} entries, but the model has {len(modules)} layers with Longformer attention; give "
            "one number for all, or one entry for each layer."
        )
    windows: list[Pattern] = []
    for layer, (module, layer_dilation) in enumerate(zip(modules, by_layer, strict=True)):
        width = module.one_sided_attn_window_size
        if isinstance(layer_dilation, int):
            windows.append(window(width, dilation=layer_dilation))
            continue
        by_head = list(layer_dilation)
        if len(by_head) != module.num_heads:
            raise ArgumentError(
                f"dilation: layer {layer} has {len(by_head)} entries for {module.num_heads} heads; give one number for the "
                "layer, or one for each head."
            )
        windows.append(per_head([window(width, dilation=d) for d in by_head]))
    return windows


def _keep_length(
    input_ids: Any, attention_mask: Any, token_type_ids: Any, position_ids: Any, inputs_embeds: Any, pad_token_id: int
) -> tuple[Any, ...]:
    """Replaces `LongformerModel._pad_to_window_size`: no padding is needed."""
    return 0, input_ids, _one_row(attention_mask), token_type_ids, position_ids, inputs_embeds


def _keep_length_led(input_ids: Any, attention_mask: Any, inputs_embeds: Any, pad_token_id: int) -> tuple[Any, ...]:
    """Replaces `LEDEncoder._pad_to_window_size`."""
    return 0, input_ids, _one_row(attention_mask), inputs_embeds


def _one_row(mask: Tensor) -> Tensor:
    """The mask that is not expanded; in a traced program, whose compiler drops the rows that nobody reads, itself."""
    return mask if torch.compiler.is_compiling() else mask.as_subclass(_OneRowMask)


class _OneRowMask(Tensor):
    """A mask `(B, N)` that is not expanded to N rows. Both models build an additive mask of N equal rows, and read the first.

    LED's encoder expands the mask. LongformerModel clamps it to 0 and 1 and passes it to transformers' mask function, which
    returns a mask that has four dimensions already.
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
