"""`lengthen`: more positions for a pretrained model than it was trained on.

A table of learned positions is tiled until it is long enough (Longformer's recipe): tokens within a window then keep the
relative positions the model was trained on, except across a seam. Rotary positions have no table; one of transformers' scaling
rules is set instead. Short texts compute what they did before, except under "yarn" and "linear".
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.configs import copy_configs, restore_configs
from farlight.hf.sentence_encoders import unwrap
from farlight.patterns.arguments import whole

__all__ = ["lengthen", "positions_of"]

# Names of position tables in transformers' modules, and of the settings that hold their length.
_TABLE_NAMES = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe", "pos_emb")
_LENGTH_SETTINGS = ("max_position_embeddings", "n_positions", "max_encoder_position_embeddings")
_ROPE = ("dynamic", "yarn", "linear")
# Layer types with a bounded distance between query and key, whatever the length of the text.
_LOCAL_LAYER_TYPES = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class _PositionTable:
    """A table of learned positions: row `special + i` of its weight for position i; the rows before have other meanings."""

    owner: nn.Module
    name: str
    path: str
    special: int

    @property
    def module(self) -> nn.Embedding:
        table = getattr(self.owner, self.name)
        assert isinstance(table, nn.Embedding)
        return table

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
        model: a PreTrainedModel, or a SentenceTransformer that holds one, whose `max_seq_length` and tokenizer follow; it
            gets an updated configuration of its own, so that it can be stored and loaded. The configuration object that it was
            built from, which other models may hold, stays as it is.
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
    inner, holder = unwrap(model)
    if holder is not None:
        lengthen(inner, max_positions, rope=rope, tokenizer=holder.tokenizer if tokenizer is None else tokenizer)
        holder.max_seq_length = max_positions
        return model
    name = type(model).__name__
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedError(f"lengthen: {name} is not a transformers model; pass a PreTrainedModel.")
    max_positions = whole("lengthen: max_positions", max_positions, 1)
    if rope not in _ROPE:
        raise ArgumentError(f"lengthen: rope = {rope!r} is unknown; use one of {', '.join(map(repr, _ROPE))}.")
    _refuse_formulas(model, config)
    tables = list(_position_tables(model, config))
    rotary = list(_rotary_modules(model))
    if not tables and not rotary:
        raise UnsupportedError(
            f"lengthen: {name} ({config.model_type}) has no table of learned positions and no rotary positions that "
            "farlight knows. If its positions are relative (T5, DeBERTa, XLNet, ALiBi), it reads longer texts as it is."
        )
    positions = min(table.positions for table in tables) if tables else _rope_positions(rotary[0].config)
    if max_positions < positions:
        raise ArgumentError(
            f"lengthen: {name} reads {positions} positions already, more than max_positions = {max_positions}; cut the "
            "texts instead."
        )
    if max_positions > positions:
        _extend_positions(model, max_positions, rope)
    if tokenizer is not None:
        tokenizer.model_max_length = max_positions
    return model


def _extend_positions(model: Any, max_positions: int, rope: str) -> None:
    """Lengthen the position tables, or scale the rotary positions, under a copied configuration; on errors restore it."""
    saved = copy_configs(model)
    try:
        tables = list(_position_tables(model, model.config))
        if tables:
            _lengthen_position_tables(model, model.config, tables, max_positions)
        else:
            _scale_rotary(model, list(_rotary_modules(model)), max_positions, rope)
    except BaseException:
        restore_configs(saved)
        raise


def positions_of(model: Any) -> int | None:
    """The longest text that a model's positions are made for, or None where nothing says so."""
    config = model.config
    tables = list(_position_tables(model, config))
    if tables:
        return min(table.positions for table in tables)
    rotary = list(_rotary_modules(model))
    if rotary:
        return _scaled_rope_positions(rotary[0].config)
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


# ---- tables -----------------------------------------------------------------------------------------------------------
def _position_tables(model: nn.Module, config: Any) -> Iterator[_PositionTable]:
    """Each table of learned positions whose length the configuration names."""
    lengths = {getattr(config.get_text_config(), name, None) for name in _LENGTH_SETTINGS}
    # LED has long inputs and short outputs: only the encoder is lengthened.
    encoder_only = hasattr(config, "max_encoder_position_embeddings")
    for path, module in model.named_modules():
        if encoder_only and "decoder" in path.split("."):
            continue
        for name, child in module.named_children():
            if name not in _TABLE_NAMES or not isinstance(child, nn.Embedding):
                continue
            # BART and OPT shift by `offset`; RoBERTa counts from its padding index on; Nyströmformer shifts its ids.
            position_ids = getattr(module, "position_ids", None)
            special = getattr(child, "offset", None)
            if special is None and child.padding_idx is not None:
                special = child.padding_idx + 1
            if special is None:
                special = int(position_ids.flatten()[0]) if isinstance(position_ids, Tensor) and position_ids.numel() else 0
            if {child.num_embeddings, child.num_embeddings - special} & lengths:
                yield _PositionTable(module, name, f"{path}.{name}".lstrip("."), special)


def _refuse_formulas(model: nn.Module, config: Any) -> None:
    """Raise UnsupportedError for sinusoidal and axial positions."""
    name = type(model).__name__
    for path, module in model.named_modules():
        class_name = type(module).__name__
        if "Sinusoidal" in class_name or (path.endswith(_TABLE_NAMES) and getattr(config, "sinusoidal_pos_embds", False)):
            raise UnsupportedError(
                f"lengthen: {name} computes its positions by a formula ({path}: {class_name}), so there is nothing to copy; "
                "load it with from_pretrained(…, max_position_embeddings=N) instead."
            )
    if getattr(config, "axial_pos_embds", False):
        raise UnsupportedError(
            f"lengthen: {name} has axial positions, the product of two tables, which cannot be copied end to end; set "
            "axial_pos_shape when you build it."
        )


def _lengthen_position_tables(model: nn.Module, config: Any, tables: list[_PositionTable], max_positions: int) -> None:
    """Tile every table and its buffers to `max_positions`, and set the configuration's length."""
    stale = _stale_buffers(model, tables)
    if stale:
        raise UnsupportedError(
            f"lengthen: {type(model).__name__} also keeps {', '.join(stale)}, made for its old length, which farlight does "
            "not know how to rebuild; load it with from_pretrained(…, max_position_embeddings=N, "
            "ignore_mismatched_sizes=True) and copy the position table yourself."
        )
    text = config.get_text_config()
    added = max_positions - tables[0].positions
    for table in tables:
        if table.positions + added != max_positions:
            raise UnsupportedError(
                f"lengthen: {type(model).__name__} has position tables of {tables[0].positions} and {table.positions} "
                f"positions ({tables[0].path}, {table.path}); lengthen takes models in which they are equal."
            )
    for table in tables:
        module = table.module
        weight = module.weight.detach()
        rows = torch.arange(max_positions, device=weight.device) % table.positions + table.special
        # The same module with a longer weight: subclasses may override `forward`.
        module.weight = nn.Parameter(torch.cat([weight[: table.special], weight[rows]]), module.weight.requires_grad)
        module.num_embeddings = module.weight.shape[0]
        for name, ids in list(table.owner.named_buffers(recurse=False)):
            if name in ("position_ids", "token_type_ids"):
                _lengthen_buffer(table.owner, name, ids, added)
    # DeBERTa's table of distances is as long as the text it was made for, unless the configuration says how long it is.
    if getattr(text, "relative_attention", False) and getattr(text, "max_relative_positions", 1) < 1:
        text.max_relative_positions = text.max_position_embeddings
    name = next(name for name in _LENGTH_SETTINGS if isinstance(getattr(text, name, None), int))
    setattr(text, name, getattr(text, name) + added)


def _lengthen_buffer(owner: nn.Module, name: str, ids: Tensor, added: int) -> None:
    """`added` more entries at the end of a buffer: position ids continue, token types repeat the last one."""
    tail = ids[..., -1:].expand(*ids.shape[:-1], added)
    if name == "position_ids":
        tail = tail + torch.arange(1, added + 1, device=ids.device)
    persistent = name not in owner._non_persistent_buffers_set
    owner.register_buffer(name, torch.cat([ids, tail], -1).contiguous(), persistent=persistent)


def _stale_buffers(model: nn.Module, tables: list[_PositionTable]) -> list[str]:
    """Integer and bool buffers of other modules with the old table's length: they would truncate the text, or fail."""
    owned = {id(buffer) for table in tables for buffer in table.owner.buffers(recurse=False)}
    lengths = {table.positions for table in tables} | {table.module.num_embeddings for table in tables}
    return [
        f"{name} {tuple(buffer.shape)}"
        for name, buffer in model.named_buffers()
        if id(buffer) not in owned and not buffer.dtype.is_floating_point and lengths & set(buffer.shape)
    ]


# ---- rotary positions ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _RotaryModule:
    """`owner.name`: a module that computes rotary angles from its configuration."""

    owner: nn.Module
    name: str
    config: Any


def _rotary_modules(model: nn.Module) -> Iterator[_RotaryModule]:
    for module in model.modules():
        for name, child in module.named_children():
            config = getattr(child, "config", None)
            if hasattr(child, "rope_type") and getattr(config, "rope_parameters", None):
                yield _RotaryModule(module, name, config)


def _scaled_parameters(config: Any) -> list[dict[str, Any]]:
    """The rope parameter dictionaries to scale: one for the model, or one for each layer type without a window."""
    parameters = config.rope_parameters
    if "rope_type" in parameters:
        return [parameters]
    return [rope for layer_type, rope in parameters.items() if isinstance(rope, dict) and layer_type not in _LOCAL_LAYER_TYPES]


def _rope_positions(config: Any) -> int:
    """Number of positions of the unscaled model."""
    length: int = config.max_position_embeddings
    return length


def _scaled_rope_positions(config: Any) -> int:
    """Number of positions of the model, its scaling included."""
    factors = [each["factor"] for each in _scaled_parameters(config) if each.get("rope_type") == "dynamic"]
    return int(config.max_position_embeddings * max(factors, default=1.0))


def _scale_rotary(model: nn.Module, rotary: list[_RotaryModule], max_positions: int, rope: str) -> None:
    """Set the scaling rule in the configuration and rebuild the rotary modules. Where it raises, nothing changed."""
    config = rotary[0].config
    positions = _rope_positions(config)
    scaled = _scaled_parameters(config)
    for each in scaled:
        rope_type = each.get("rope_type", "default")
        if rope_type != "default":
            raise UnsupportedError(
                f"lengthen: {type(model).__name__} already has rotary positions scaled by {rope_type!r} ({each}), and one "
                "scaling on top of another is not defined; set config.rope_parameters yourself, or start from the "
                "unscaled model."
            )
    before = copy.deepcopy((config.rope_parameters, positions))
    replacements = []
    try:
        for each in scaled:
            each.update(rope_type=rope, factor=max_positions / positions)
            if rope == "yarn":
                each["original_max_position_embeddings"] = positions
        if rope != "dynamic":
            # The dynamic rule compares a text with the training length, which it reads from here.
            config.max_position_embeddings = max_positions
        config.validate_rope()
        replacements = [type(getattr(item.owner, item.name))(item.config) for item in rotary]
    except (ValueError, ZeroDivisionError) as error:
        config.rope_parameters, config.max_position_embeddings = before
        raise UnsupportedError(
            f"lengthen: {type(model).__name__} does not take rope={rope!r} ({error}); try another of "
            f"{', '.join(map(repr, _ROPE))}, or set config.rope_parameters as its documentation says."
        ) from error
    for item, new in zip(rotary, replacements, strict=True):
        old = getattr(item.owner, item.name)
        device = next((buffer.device for buffer in old.buffers()), None)
        setattr(item.owner, item.name, new.to(device).train(old.training))
