"""`sparsify` and `restore`: farlight's attention inside a Hugging Face model until it is undone.

`use_pattern` lasts for a `with` block; here the same setting stays on the model. It is an attribute of the modules, not a
weight: parameters, state dict and configuration file are those of the dense model, so a checkpoint of one loads into the
other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from farlight.distributed import Layout
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf import bigbird, longformer, swap
from farlight.hf.fit_file import read_layers
from farlight.hf.interface import install_pattern
from farlight.hf.sentence_encoders import unwrap
from farlight.hf.setting import LayerPattern, PartPattern
from farlight.hf.spread import Spread

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["restore", "sparsify"]

_UNDO = "_farlight_undo"


def sparsify(
    model: Any,
    pattern: LayerPattern | Mapping[int, LayerPattern] | Mapping[str, PartPattern] | str | os.PathLike[str] = None,
    *,
    backend: str = "auto",
    mesh: DeviceMesh | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> Any:
    """Make a Hugging Face model compute its attention with farlight, under `pattern`; the model is changed and returned.

    A pair (query i, key j) of a layer is allowed when the model's own mask (padding, causality, sliding windows) and `pattern`
    both allow it. Parameters stay what they are; `restore(model)` undoes it.

    Longformer, LED, BigBird and BigBird-Pegasus have a sparse attention of their own, which is replaced by farlight's
    (`farlight.hf.longformer`, `farlight.hf.bigbird`); `pattern` must be None for them, and `options` are theirs. The modules of
    BLOOM, MPT and Falcon, which add ALiBi to their own scores, are replaced too, and take any pattern (`farlight.hf.alibi`).

    Args:
        model: a PreTrainedModel of these, or one that takes its attention from AttentionInterface; or a SentenceTransformer
            that holds one.
        pattern: one pattern or router for all layers; a mapping {layer number: pattern, router or None}; the path of a file
            written by `fl.fit` or `write_layers`; or None, the model's own attention computed by farlight. Layers that
            are not named keep the model's own attention. For a model of two texts (T5, BART) a mapping of its parts "encoder",
            "decoder" (the decoder's own attention) and "cross" (from the decoder to the encoder), each one pattern, or a
            mapping by layer number within the part. In "cross", query i is the decoder's token i, key j the encoder's token j.
        backend: as for `fl.attention`.
        mesh: a `DeviceMesh` of one dimension over whose ranks the sequence is spread (docs/distributed.md). Each rank calls the
            model with its own tokens and their `position_ids`, as `fl.hf.sequence_collator` gives them, and without a cache.
            `pattern` is that of the whole sequence; the model's own causality and sliding windows are kept.
        layout: who owns which tokens; None: contiguous shards in rank order, whose lengths are gathered.

    `copy.deepcopy` and pickle keep the setting. `save_pretrained` writes the dense model: call `sparsify` again after
    `from_pretrained`, with the same pattern or file. Calling it on a sparse model replaces the pattern.

    Raises:
        ArgumentError: `pattern` is something else, names a layer that the model does not have, or is given for a model that
            brings its own; an option that the model does not have.
        PatternError: the file is not one of per-layer patterns.
        UnsupportedError: the model has cross-attention, under one pattern for all; "cross" has a router or names queries; the
            model does not take its attention from AttentionInterface.

    >>> import torch, farlight as fl
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8)
    >>> model = fl.hf.sparsify(BertModel(BertConfig(**sizes)).eval(), {0: fl.window(2), 1: fl.window(8)})
    >>> with torch.no_grad():
    ...     model(torch.arange(6)[None]).last_hidden_state.shape
    torch.Size([1, 6, 8])
    """
    inner, _ = unwrap(model)
    if inner is not model:
        sparsify(inner, pattern, mesh=mesh, layout=layout, backend=backend, **options)
        return model
    spread = None if mesh is None else Spread(mesh, layout)
    if mesh is None and layout is not None:
        raise ArgumentError("sparsify: a layout says how a sequence is spread over the ranks of a mesh; pass mesh=, too.")
    for family in (longformer, bigbird):
        if family.replaces(model):
            if spread is not None:
                raise UnsupportedError(
                    f"{type(model).__name__} over ranks is not served: it brings a sparse attention of its own."
                )
            if pattern is not None:
                raise ArgumentError(
                    f"{type(model).__name__} brings a sparse attention of its own, which farlight computes as it is; leave "
                    f"the pattern out (see farlight.hf.{family.__name__.split('.')[-1]}.sparsify for its options)."
                )
            return family.sparsify(model, backend=backend, **options)
    if options:
        raise ArgumentError(
            f"sparsify: {next(iter(options))!r} is not an option for {type(model).__name__}; it takes a pattern and backend."
        )
    layer_patterns: Any = read_layers(pattern) if isinstance(pattern, str | os.PathLike) else pattern
    undo = install_pattern(model, layer_patterns, backend=backend, spread=spread)
    # `restore` goes back to the state before the first call.
    model.__dict__.setdefault(_UNDO, undo)
    return model


def restore(model: Any) -> Any:
    """Undo `sparsify`: the model computes its attention as before the first call. Returns the model.

    Raises ArgumentError when the model is not sparse, or when only the model around it or a part of it was made so.
    """
    inner, _ = unwrap(model)
    if inner is not model:
        restore(inner)
        return model
    undo = model.__dict__.pop(_UNDO, None)
    if undo is None and swap.contains(model, swap.Replacement):
        return swap.restore(model)
    if undo is None:
        raise ArgumentError(
            f"this {type(model).__name__} was not made sparse by fl.hf.sparsify; call restore on the very model that was given "
            "to it."
        )
    undo()
    return model
