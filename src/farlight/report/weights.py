"""Attention weights in a page: the heaviest keys of each row of one passage, for chosen layers and heads.

Weights travel as 16-bit logarithms, round(-4096 · ln p), a relative error below 0.00013 from 1 down to 0.0000002; keys as
differences within a row, and each candidate's allowed keys as bits. About 60 kB per head and 512 tokens under six patterns.
What a page carries is bounded before it is computed, by the keys that its rows may have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from farlight.analysis.audit import Audit
from farlight.analysis.candidates_by_layer import Judged, Subject
from farlight.analysis.loss.heavy_keys import EACH, FULL, HeavyKeys, heavy_keys
from farlight.analysis.passages import Passages
from farlight.errors import ArgumentError
from farlight.report.packing import pack

__all__ = ["MAX_TOKENS", "carried_heads", "check_number", "weights"]

# Keys of all rows and heads together: up to 1.6 MB of the page for the heads that are chosen, twice as many for named ones,
# which still fit beside the longest text that a page carries.
_CHOSEN_KEYS, _NAMED_KEYS = 3 << 18, 3 << 19
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
    for a head that the model does not have, and for more heads than a page carries.
    """
    if passages.length > MAX_TOKENS:
        return None
    if heads is not None:
        check_number(len(set(heads)), passages.length, len(patterns))
    chosen = carried_heads(result, passages.length) if heads is None else list(dict.fromkeys(heads))
    passage = passages.count // 2
    rows = heavy_keys(model, passages.ids[passage], patterns, chosen)
    return {"passage": passage, "heads": [_packed(head) for head in rows]}


def carried_heads(result: Audit, tokens: int) -> list[tuple[int, int]]:
    """(layer, head) that a page carries by default, as many as `_CHOSEN_KEYS` allows: evenly from the layers, and of each layer
    in turn the head that loses most under the patterns of the audit, the one that loses least, and so on inwards."""
    count = max(1, min(_CHOSEN_KEYS // _keys_of_a_head(tokens, len(result.patterns)), result.layers * result.heads))
    mass = torch.tensor([row.mass_by_head for row in result.patterns], dtype=torch.float64).mean(0)
    layers = sorted({round(x) for x in np.linspace(0, result.layers - 1, min(count, result.layers))})
    chosen: list[tuple[int, int]] = []
    for place in range(result.heads):
        for layer in layers:
            order = mass[layer].argsort(stable=True).tolist()
            head = order[place // 2] if place % 2 == 0 else order[-1 - place // 2]
            chosen.append((layer, head))
    return sorted(chosen[:count])


def check_number(heads: int, tokens: int, patterns: int) -> None:
    """Raise ArgumentError for more heads than a page carries at this length and number of patterns."""
    each = _keys_of_a_head(tokens, patterns)
    if heads > 1 and heads * each > _NAMED_KEYS:
        raise ArgumentError(
            f"a page cannot carry the attention weights of {heads} heads: of passages of {tokens} tokens under {patterns} "
            f"pattern{'s' * (patterns > 1)} it carries {max(1, _NAMED_KEYS // each)}; name fewer heads, or give fewer patterns "
            "or shorter passages."
        )


def _keys_of_a_head(tokens: int, patterns: int) -> int:
    """The most keys of all rows: those heaviest in full attention and under each pattern."""
    return max(1, tokens * min(tokens, FULL + EACH * patterns))


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
