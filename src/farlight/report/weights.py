"""Attention weights in a page: the heaviest keys of each row of one passage, for chosen layers and heads.

Weights travel as 16-bit logarithms, round(-4096 · ln p), a relative error below 0.00013 from 1 down to 0.0000002; keys as
differences within a row, and each candidate's allowed keys as bits. About 60 kB per head and 512 tokens under six patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from farlight.analysis.audit import Audit
from farlight.analysis.candidates_by_layer import Judged, Subject
from farlight.analysis.loss.heavy_keys import HeavyKeys, heavy_keys
from farlight.analysis.passages import Passages
from farlight.report.packing import pack

__all__ = ["MAX_TOKENS", "carried_heads", "weights"]

# Rows of all heads together: about 1.6 MB of the page under six patterns, of each of which a row carries its heaviest keys.
_MAX_ROWS = 12_288
# A longer passage is carried without weights.
MAX_TOKENS = 8192
_LOG_STEPS = 4096


def weights(
    model: Any,
    result: Audit,
    patterns: Sequence[Judged | Subject],
    passages: Passages,
    heads: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Any] | None:
    """What chosen heads attend to in the middle passage of an audit, as plain values for JSON; None for too long a passage.

    model, patterns, passages: those of the audit. heads: (layer, head); None chooses (`carried_heads`). Raises ArgumentError
    for a head that the model does not have.
    """
    if passages.length > MAX_TOKENS:
        return None
    chosen = carried_heads(result, passages.length) if heads is None else list(dict.fromkeys(heads))
    passage = passages.count // 2
    rows = heavy_keys(model, passages.ids[passage], patterns, chosen)
    return {"passage": passage, "heads": [_packed(head) for head in rows]}


def carried_heads(result: Audit, tokens: int) -> list[tuple[int, int]]:
    """(layer, head) that a page carries by default, as many as `_MAX_ROWS` allows: evenly from the layers, and of each layer
    in turn the head that loses most under the patterns of the audit, the one that loses least, and so on inwards."""
    count = max(1, min(_MAX_ROWS // max(1, tokens), result.layers * result.heads))
    mass = torch.tensor([row.mass_by_head for row in result.patterns], dtype=torch.float64).mean(0)
    layers = sorted({round(x) for x in np.linspace(0, result.layers - 1, min(count, result.layers))})
    chosen: list[tuple[int, int]] = []
    for place in range(result.heads):
        for layer in layers:
            order = mass[layer].argsort(stable=True).tolist()
            head = order[place // 2] if place % 2 == 0 else order[-1 - place // 2]
            chosen.append((layer, head))
    return sorted(chosen[:count])


def _packed(rows: HeavyKeys) -> dict[str, Any]:
    counts = rows.first.diff().numpy()
    keys = rows.key.numpy()
    starts = rows.first[:-1].numpy()[counts > 0]
    steps = np.diff(keys, prepend=0)
    steps[starts] = keys[starts]
    return {
        "layer": rows.layer,
        "head": rows.head,
        "counts": pack(counts, "u2"),
        "steps": pack(steps, "u2"),
        "full": pack(_logarithm(rows.probability.numpy()), "u2"),
        "allowed": [pack(np.packbits(bits.numpy(), bitorder="little"), "u1") for bits in rows.allowed],
        "kept": [None if bool(share.isnan().any()) else pack(_logarithm(share.numpy()), "u2") for share in rows.kept],
    }


def _logarithm(share: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """-4096 · ln(share) as uint16; 65535 stands for everything below e^-16, zero included."""
    with np.errstate(divide="ignore"):
        steps = -_LOG_STEPS * np.log(share.astype(np.float64))
    rounded: np.ndarray[Any, Any] = np.rint(np.clip(steps, 0, 65535)).astype(np.uint16)
    return rounded
