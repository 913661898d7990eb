"""Give a pretrained model more positions than it was trained on.

A learned table of positions is copied end to end until it is long enough (Longformer's recipe): near tokens, which is
what a window shows, then keep the relative places that the model knows. Rotary positions have no table; models that use
them have scaling rules of their own, and one of these is set. What a model knows about short texts does not change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.configs import own_configs, put_back
from farlight.patterns.arguments import whole

__all__ = ["lengthen", "positions_of"]

# What the tables of learned positions are called in transformers, and the settings that say how long they are.
_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe", "pos_emb")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_encoder_position_embeddings")
_ROPE = ("dynamic", "yarn", "linear")
# Layers that never look far: there distances stay those of training however long the text is.
_NEAR = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class _Table:
    """A table of learned positions: `weight[special + i]` for the token at i, and rows before that with other meanings."""

    owner: nn.Module
    name: str
    path: str
    special: int

    @property
    def module(self) -> nn.Embedding:
        found = getattr(self.owner, self.name)
        assert isinstance(found, nn.Embedding)
        return found

    @property
    def positions(self) -> int:
        return self.module.num_embeddings - self.special


def lengthen(model: Any, max_positions: int, *, rope: str = "dynamic", tokenizer: Any = None) -> Any:
    """Let a Hugging Face model read texts of `max_positions` tokens; returns the same model, changed in place.

    Learned positions: row i of the new table is row `i mod n` of the old one of n rows; rows that stand for no position
    (RoBERTa's up to its padding index, OPT's and BART's first two) are kept once at the front. Beltagy, Peters & Cohan
    2020, arXiv:2004.05150, section 5.

    Rotary positions: `config.rope_parameters` are given the model's own scaling for a text `max_positions / n` times as
    long; layers with a sliding window, which see no new distances, are left as they are.

    * "dynamic": nothing changes up to n tokens; beyond, the base grows with the text (NTK-aware). The default, since short
      texts keep their numbers.
    * "yarn": frequencies are interpolated by wavelength, and scores are sharpened; better far out, and it changes short
      texts a little. Peng et al. 2023, arXiv:2309.00071.
    * "linear": positions are divided by the factor. Chen et al. 2023, arXiv:2306.15595. Made for further training.

    Full attention over a lengthened text costs what it costs: run the model under a pattern (`fl.hf.use_pattern`).

    Args:
        model: a PreTrainedModel; it gets an updated configuration of its own, so that it can be stored and loaded. The
            configuration object that it was built from, which other models may hold, stays as it is.
        max_positions: the longest text, in tokens, special ones included.
        rope: which scaling, for rotary positions.
        tokenizer: also let this tokenizer cut at `max_positions` only (its `model_max_length`).

    Raises:
        ArgumentError: fewer positions than there are. UnsupportedError: positions that are computed by a formula, or
            relative to one another, or already scaled in another way; the message says what to do instead.

    >>> import torch, farlight as fl
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    >>> model = BertModel(BertConfig(vocab_size=30, max_position_embeddings=16, **sizes)).eval()
    >>> fl.hf.lengthen(model, 100)(torch.ones(1, 100, dtype=torch.long)).last_hidden_state.shape
    torch.Size([1, 100, 8])
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedError(f"lengthen: {name} is not a transformers model; pass a PreTrainedModel.")
    wanted = whole("lengthen: max_positions", max_positions, 1)
    if rope not in _ROPE:
        raise ArgumentError(f"lengthen: rope = {rope!r} is unknown; use one of {', '.join(map(repr, _ROPE))}.")
    _refuse_formulas(model, config)
    tables = list(_tables(model, config))
    rotary = list(_rotary(model))
    if not tables and not rotary:
        raise UnsupportedError(
            f"lengthen: {name} ({config.model_type}) has no table of learned positions and no rotary positions that "
            "farlight knows. If its positions are relative (T5, DeBERTa, XLNet, ALiBi), it reads longer texts as it is."
        )
    known = min(table.positions for table in tables) if tables else _rope_positions(rotary[0].config)
    if wanted < known:
        raise ArgumentError(
            f"lengthen: {name} reads {known} positions already, more than the {wanted} asked for; cut the texts instead."
        )
    if wanted > known:
        held = own_configs(model)
        try:
            if tables:
                _lengthen_tables(model, model.config, list(_tables(model, model.config)), wanted)
            else:
                _scale_rotary(model, list(_rotary(model)), wanted, rope)
        except BaseException:
            put_back(held)
            raise
    if tokenizer is not None:
        tokenizer.model_max_length = wanted
    return model


def positions_of(model: Any) -> int | None:
    """The longest text that a model's positions are made for, or None where nothing says so."""
    config = model.config
    tables = list(_tables(model, config))
    if tables:
        return min(table.positions for table in tables)
    rotary = list(_rotary(model))
    if rotary:
        return _rope_reach(rotary[0].config)
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


# ---- tables -----------------------------------------------------------------------------------------------------------
def _tables(model: nn.Module, config: Any) -> Iterator[_Table]:
    """Each table of learned positions whose length the configuration names."""
    lengths = {getattr(config.get_text_config(), name, None) for name in _LENGTHS}
    # LED reads long texts and writes short ones: only what it reads with is lengthened.
    apart = hasattr(config, "max_encoder_position_embeddings")
    for path, module in model.named_modules():
        if apart and "decoder" in path.split("."):
            continue
        for name, child in module.named_children():
            if name not in _TABLES or not isinstance(child, nn.Embedding):
                continue
            # BART and OPT shift by `offset`; RoBERTa counts from its padding index on; Nyströmformer shifts its ids.
            first = getattr(module, "position_ids", None)
            special = getattr(child, "offset", None)
            if special is None and child.padding_idx is not None:
                special = child.padding_idx + 1
            if special is None:
                special = int(first.flatten()[0]) if isinstance(first, Tensor) and first.numel() else 0
            if {child.num_embeddings, child.num_embeddings - special} & lengths:
                yield _Table(module, name, f"{path}.{name}".lstrip("."), special)


def _refuse_formulas(model: nn.Module, config: Any) -> None:
    name = type(model).__name__
    for path, module in model.named_modules():
        kind = type(module).__name__
        if "Sinusoidal" in kind or (path.endswith(_TABLES) and getattr(config, "sinusoidal_pos_embds", False)):
            raise UnsupportedError(
                f"lengthen: {name} computes its positions by a formula ({path}: {kind}), so there is nothing to copy; load "
                "it with from_pretrained(…, max_position_embeddings=N) instead."
            )
    if getattr(config, "axial_pos_embds", False):
        raise UnsupportedError(
            f"lengthen: {name} has axial positions, the product of two tables, which cannot be copied end to end; set "
            "axial_pos_shape when you build it."
        )


def _lengthen_tables(model: nn.Module, config: Any, tables: list[_Table], wanted: int) -> None:
    stale = _other_buffers(model, tables)
    if stale:
        raise UnsupportedError(
            f"lengthen: {type(model).__name__} also keeps {', '.join(stale)}, made for its old length, which farlight does "
            "not know how to rebuild; load it with from_pretrained(…, max_position_embeddings=N, "
            "ignore_mismatched_sizes=True) and copy the position table yourself."
        )
    text = config.get_text_config()
    added = wanted - tables[0].positions
    for table in tables:
        if table.positions + added != wanted:
            raise UnsupportedError(
                f"lengthen: {type(model).__name__} has position tables of {tables[0].positions} and {table.positions} "
                f"places ({tables[0].path}, {table.path}); lengthen takes models in which they are equal."
            )
    for table in tables:
        old = table.module
        weight = old.weight.detach()
        rows = torch.arange(wanted, device=weight.device) % table.positions + table.special
        # The same module with a longer weight, so that subclasses with a forward of their own stay what they are.
        old.weight = nn.Parameter(torch.cat([weight[: table.special], weight[rows]]), old.weight.requires_grad)
        old.num_embeddings = old.weight.shape[0]
        for name, ids in list(table.owner.named_buffers(recurse=False)):
            if name in ("position_ids", "token_type_ids"):
                _lengthen_buffer(table.owner, name, ids, added)
    # DeBERTa's table of distances is as long as the text it was made for, unless the configuration says how long it is.
    if getattr(text, "relative_attention", False) and getattr(text, "max_relative_positions", 1) < 1:
        text.max_relative_positions = text.max_position_embeddings
    name = next(name for name in _LENGTHS if isinstance(getattr(text, name, None), int))
    setattr(text, name, getattr(text, name) + added)


def _lengthen_buffer(owner: nn.Module, name: str, ids: Tensor, added: int) -> None:
    """Positions count on; token types repeat the last one."""
    more = ids[..., -1:].expand(*ids.shape[:-1], added)
    if name == "position_ids":
        more = more + torch.arange(1, added + 1, device=ids.device)
    kept = name not in owner._non_persistent_buffers_set
    owner.register_buffer(name, torch.cat([ids, more], -1).contiguous(), persistent=kept)


def _other_buffers(model: nn.Module, tables: list[_Table]) -> list[str]:
    """Masks and indices elsewhere that are as long as the old table: they would cut the text short, or fail."""
    owned = {id(buffer) for table in tables for buffer in table.owner.buffers(recurse=False)}
    lengths = {table.positions for table in tables} | {table.module.num_embeddings for table in tables}
    return [
        f"{name} {tuple(buffer.shape)}"
        for name, buffer in model.named_buffers()
        if id(buffer) not in owned and not buffer.dtype.is_floating_point and lengths & set(buffer.shape)
    ]


# ---- rotary positions ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Rotary:
    """A module that computes the angles of a model's rotary positions, from its configuration."""

    owner: nn.Module
    name: str
    config: Any


def _rotary(model: nn.Module) -> Iterator[_Rotary]:
    for module in model.modules():
        for name, child in module.named_children():
            config = getattr(child, "config", None)
            if hasattr(child, "rope_type") and getattr(config, "rope_parameters", None):
                yield _Rotary(module, name, config)


def _scaled(config: Any) -> list[dict[str, Any]]:
    """The rope parameters that a longer text concerns."""
    parameters = config.rope_parameters
    if "rope_type" in parameters:
        return [parameters]
    return [each for kind, each in parameters.items() if isinstance(each, dict) and kind not in _NEAR]


def _rope_positions(config: Any) -> int:
    """How many positions the unscaled model reads."""
    length: int = config.max_position_embeddings
    return length


def _rope_reach(config: Any) -> int:
    """How many positions the model reads, its scaling included."""
    factors = [each["factor"] for each in _scaled(config) if each.get("rope_type") == "dynamic"]
    return int(config.max_position_embeddings * max(factors, default=1.0))


def _scale_rotary(model: nn.Module, rotary: list[_Rotary], wanted: int, rope: str) -> None:
    config = rotary[0].config
    known = _rope_positions(config)
    scaled = _scaled(config)
    for each in scaled:
        kind = each.get("rope_type", "default")
        if kind != "default":
            raise UnsupportedError(
                f"lengthen: {type(model).__name__} already has rotary positions scaled by {kind!r} ({each}), and one "
                "scaling on top of another is not defined; set config.rope_parameters yourself, or start from the "
                "unscaled model."
            )
    before = copy.deepcopy((config.rope_parameters, known))
    made = []
    try:
        for each in scaled:
            each.update(rope_type=rope, factor=wanted / known)
            if rope == "yarn":
                each["original_max_position_embeddings"] = known
        if rope != "dynamic":
            # The dynamic rule measures a text against the length of training, which it reads from here.
            config.max_position_embeddings = wanted
        config.validate_rope()
        made = [type(getattr(place.owner, place.name))(place.config) for place in rotary]
    except (ValueError, ZeroDivisionError) as error:
        config.rope_parameters, config.max_position_embeddings = before
        raise UnsupportedError(
            f"lengthen: {type(model).__name__} does not take rope={rope!r} ({error}); try another of "
            f"{', '.join(map(repr, _ROPE))}, or set config.rope_parameters as its documentation says."
        ) from error
    for place, new in zip(rotary, made, strict=True):
        old = getattr(place.owner, place.name)
        device = next((buffer.device for buffer in old.buffers()), None)
        setattr(place.owner, place.name, new.to(device).train(old.training))
