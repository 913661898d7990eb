"""BLOOM, MPT and Falcon: attention modules that compute their own scores, replaced so that farlight's attention function does.

Their modules do not use AttentionInterface: they add ALiBi to the scores and attend by matrix products. A replacement shares
the parameters, projects, rotates and updates the cache as the original does, and calls `attention_forward` with the bias as a
score term, so that patterns, routers, layer mappings and observers reach it as any other model. With α the bias tensor of the
model's own function and D the head_dim:

    BLOOM           q·k / √D + α[b, h, j]            α = slope[h] · (number of real keys before j)
    MPT             q·k · softmax_scale + α[h, j]    α = slope[h] · (j - last key)
    Falcon, ALiBi   (q·k + α[b, h, j]) / √D          α = bfloat16(slope[h]) · (number of real keys before j), in bfloat16
    Falcon, rotary  q·k / √D

Press, Smith & Lewis 2022, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
arXiv:2108.12409. `farlight.hf.interface` installs and removes the replacements.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from farlight.errors import UnsupportedError
from farlight.hf.attention_function import attention_forward
from farlight.hf.configs import configs_of
from farlight.hf.lazy_mask import LazyMask, ModelMask
from farlight.hf.model_score import alibi_score
from farlight.hf.setting import ATTN_IMPLEMENTATION
from farlight.hf.swap import Replacement, TensorVersion, children, contains, loaded_class, set_attribute, split_heads
from farlight.score import Score

__all__ = ["BloomAttention", "FalconAttention", "MptAttention", "install", "set_implementation"]


class _InterfaceAttention(Replacement):
    """A replacement that calls `attention_forward`; `farlight.hf.layers` recognises it by the attribute."""

    calls_attention_interface = True

    def __init__(self, original: Any, scores: _ScoreCache) -> None:
        super().__init__(original)
        self.layer_idx: int | None = original.layer_idx
        self._scores = scores


class BloomAttention(_InterfaceAttention):
    """Replaces one `BloomAttention`, with the same call."""

    query_key_value: nn.Module
    dense: nn.Linear
    attention_dropout: nn.Dropout

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Any,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`(B, N, E)` to `(B, N, E)` with the residual added, and the probabilities under `output_attentions`.

        `alibi` `(B·H, 1, n_k)` as `BloomModel` makes it.
        """
        module: Any = self.original
        _check_cache(module, layer_past, use_cache)
        q, k, v = module._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        bias = alibi.view(q.shape[0], module.num_heads, -1)
        score = self._scores(alibi, attention_mask, lambda mask: alibi_score(bias, mask))
        out, weights = attention_forward(
            self, q, k, v, attention_mask, self.attention_dropout.p if self.training else 0.0, module.inv_norm_factor,
            output_attentions=output_attentions, score=score,
        )  # fmt: skip
        out = out.flatten(2)
        if module.pretraining_tp > 1 and module.slow_but_exact:  # transformers' sum over slices leaves the bias out
            out = functional.linear(out, self.dense.weight)
        else:
            out = self.dense(out)
        return residual + functional.dropout(out, module.hidden_dropout, self.training), weights


class MptAttention(_InterfaceAttention):
    """Replaces one `MptAttention`, with the same call. `returns_probabilities` is set by the block around it."""

    Wqkv: nn.Module
    out_proj: nn.Module

    def __init__(self, original: Any, scores: _ScoreCache) -> None:
        super().__init__(original, scores)
        self.returns_probabilities = False

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor | None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`(B, N, E)` to `(B, N, E)`, and the probabilities under `output_attentions`.

        `position_bias` `(H, 1, max_seq_len)` as `MptModel` makes it.
        """
        module: Any = self.original
        mixed = self.Wqkv(hidden_states)
        if module.clip_qkv:
            mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        q, k, v = (split_heads(x, module.n_heads) for x in mixed.chunk(3, dim=2))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if isinstance(attention_mask, Tensor) and not isinstance(attention_mask, LazyMask):
            attention_mask = ~attention_mask  # the caller's own 4-D mask, of which MptModel made True = hidden
        score = None
        if position_bias is not None:
            n_k = k.shape[2]
            score = self._scores(position_bias, attention_mask, lambda mask: _mpt_score(position_bias, mask, n_k))
        out, weights = attention_forward(
            self, q, k, v, attention_mask, module.attn_dropout_p if self.training else 0.0, module.softmax_scale,
            output_attentions=self.returns_probabilities, score=score,
        )  # fmt: skip
        return self.out_proj(out.flatten(2)), weights


class FalconAttention(_InterfaceAttention):
    """Replaces one `FalconAttention`, with ALiBi or rotary positions, with the same call."""

    query_key_value: nn.Module
    dense: nn.Module
    attention_dropout: nn.Dropout

    def forward(
        self,
        hidden_states: Tensor,
        alibi: None,
        attention_mask: Any,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`(B, N, E)` to `(B, N, E)`, and the probabilities under `output_attentions`.

        `alibi` is None: the model is told to leave its mask alone, and the bias is made here from the padding. Attention
        dropout acts on layers with ALiBi only, as in transformers.
        """
        module: Any = self.original
        _check_cache(module, layer_past, use_cache)
        q, k, v = (x.transpose(1, 2) for x in module._split_heads(self.query_key_value(hidden_states)))
        dropout, uses_alibi = 0.0, module.config.alibi
        if uses_alibi:
            dropout = self.attention_dropout.p if self.training else 0.0
        else:
            q, k = loaded_class("falcon.modeling_falcon", "apply_rotary_pos_emb")(q, k, *position_embeddings)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        score = None
        if uses_alibi:
            num_heads, n_k = module.num_heads, k.shape[2]
            score = self._scores(
                None, attention_mask, lambda mask: _falcon_score(num_heads, module.head_dim, q.dtype, q.device, mask, n_k)
            )
        out, weights = attention_forward(
            self, q, k, v, attention_mask, dropout, module.inv_norm_factor, output_attentions=output_attentions, score=score
        )
        return self.dense(out.flatten(2)), weights


def _check_cache(module: nn.Module, cache: Any, use_cache: bool) -> None:
    """Raise where a cache meets use_cache=False, MPT's default: `generate` then passes the whole text at every step."""
    if cache is not None and not use_cache:
        raise UnsupportedError(
            f"{type(module).__name__} was given a cache with use_cache=False, under which generate passes the whole text at "
            "every step and the cache would hold it again; pass use_cache=True."
        )


# ---- scores -------------------------------------------------------------------------------------------------------------
def _mpt_score(position_bias: Tensor, mask: ModelMask | None, n_k: int) -> Score:
    """MPT's bias, whose last column is that of the last key. A text longer than its columns continues the slope."""
    columns = position_bias.shape[2]
    positions = torch.arange(1 - columns, 1, device=position_bias.device)[None]
    bias = position_bias.transpose(0, 1)
    if mask is not None and mask.n_k is not None:  # its last column stands at the end of a static cache: a constant in each row
        n_k = mask.n_k
    return alibi_score(bias, mask, positions, bias[..., max(0, columns - n_k) :])


def _falcon_score(
    num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, mask: ModelMask | None, n_k: int
) -> Score:
    """Falcon's bias from the padding of each text, by transformers' own function, as its SDPA path scales it."""
    if mask is None:
        raise UnsupportedError(
            "FalconAttention with ALiBi was given a 4-D attention mask, which does not say which keys are padding and so where "
            "each key stands; pass the model a 2-D attention_mask."
        )
    real = mask.key_real
    if real is None:
        real = torch.ones(1, n_k if mask.n_k is None else mask.n_k, dtype=torch.bool, device=device)
    alibi = loaded_class("falcon.modeling_falcon", "build_alibi_tensor")(real.long(), num_heads, dtype=dtype)
    return alibi_score(alibi.view(real.shape[0], num_heads, -1) / math.sqrt(head_dim), mask)


class _ScoreCache:
    """The score of the latest pass: every layer of a model receives the same bias and mask. Copies start empty."""

    def __init__(self) -> None:
        self._last: tuple[TensorVersion, Any, Score] | None = None

    def __reduce__(self) -> tuple[type[_ScoreCache], tuple[()]]:
        return _ScoreCache, ()

    def __call__(self, bias: Tensor | None, attention_mask: Any, make: Callable[[ModelMask | None], Score]) -> Score:
        mask = attention_mask.model_mask if isinstance(attention_mask, LazyMask) else attention_mask
        mask = mask if isinstance(mask, ModelMask) else None
        if torch.compiler.is_compiling() or mask is None:
            return make(mask)
        last = self._last
        if last is not None and last[0].is_unchanged(bias) and last[1]() is mask:
            return last[2]
        score = make(mask)
        self._last = TensorVersion(bias), weakref.ref(mask), score
        return score


# ---- installation -------------------------------------------------------------------------------------------------------
# (file, class of the attention module, class of the model around it, the replacement)
_CLASSES = (
    ("bloom.modeling_bloom", "BloomAttention", "BloomModel", BloomAttention),
    ("mpt.modeling_mpt", "MptAttention", "MptModel", MptAttention),
    ("falcon.modeling_falcon", "FalconAttention", "FalconModel", FalconAttention),
    ("falcon.modeling_falcon", "FalconFlashAttention2", "FalconModel", FalconAttention),
)


def install(model: nn.Module) -> bool:
    """Replace the attention modules of BLOOM, MPT and Falcon in a model; whether there were any. `swap.restore` undoes it.

    `set_implementation` follows, when the caller has copied the configurations.
    """
    if contains(model, _InterfaceAttention):
        return False
    has_replaced = False
    for file, cls, owner_name, replacement in _CLASSES:
        sites = list(children(model, loaded_class(file, cls)))
        scores = _ScoreCache()
        for parent, name, child in sites:
            setattr(parent, name, replacement(child, scores))
            if replacement is MptAttention:
                set_attribute(parent, parent, "forward", _MptBlockForward(parent))
        if not sites:
            continue
        has_replaced = True
        owner_class = loaded_class(file, owner_name)
        for owner in [module for module in model.modules() if isinstance(module, owner_class)]:
            if owner_name == "FalconModel":
                set_attribute(owner, owner, "use_alibi", False)
    return has_replaced


def set_implementation(model: nn.Module) -> None:
    """Set farlight's implementation in the configurations of the models around replacements, which transformers refuses to."""
    owners = tuple({loaded_class(file, owner_name) for file, _, owner_name, _ in _CLASSES} - {None})
    for module in model.modules():
        if isinstance(module, owners) and contains(module, _InterfaceAttention):
            for config in configs_of(module):
                config._attn_implementation_internal = ATTN_IMPLEMENTATION


class _MptBlockForward:
    """The `forward` of an `MptBlock`, which keeps `output_attentions` and `use_cache` from its attention."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self, *args: Any, output_attentions: bool = False, **options: Any) -> Any:
        if self.block.attn.returns_probabilities != output_attentions:
            self.block.attn.returns_probabilities = output_attentions
        _check_cache(self.block, options.get("layer_past"), options.get("use_cache", False))
        return type(self.block).forward(self.block, *args, output_attentions=output_attentions, **options)
