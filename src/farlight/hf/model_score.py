"""Score terms that a model passes to its attention: softcap (Gemma 2), T5's position_bias and ALiBi.

The last two come as tensors of biases and are read as functions of the distance where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from farlight.errors import UnsupportedError
from farlight.hf.lazy_mask import ModelMask
from farlight.patterns.algebra import looks_back
from farlight.score import Score, alibi, key_bias, relative, softcap

__all__ = ["alibi_score", "model_score"]

# Rounding of a product slope · position and of the slope read from it, relative: twice that of float32.
_ROUNDING = 2.0**-22


def model_score(module: nn.Module, kwargs: dict[str, Any], num_heads: int, n_q: int, n_k: int, q_offset: int) -> Score | None:
    """The `fl.score` of a call's `softcap`, `position_bias` and `score`; None without any. Raises UnsupportedError.

    position_bias `(1, H, n_q, columns)`: a function of the distance of key and query, of which the first row and column are
    read; columns from n_k on are empty slots of a cache. Gradients of the table sum to those of the whole matrix.
    """
    cap, bias = kwargs.get("softcap"), kwargs.get("position_bias")
    score = None if cap is None else softcap(float(cap))
    given: Score | None = kwargs.get("score")  # from farlight's own replacements
    if given is not None:
        score = given if score is None else score + given
    if bias is None:
        return score
    if (
        not isinstance(bias, Tensor)
        or bias.dim() != 4
        or bias.shape[0] != 1
        or bias.shape[1] != num_heads
        or bias.shape[2] != n_q
    ):
        raise _unreadable(module, bias, f"(1, {num_heads}, {n_q}, {n_k})")
    if bias.shape[3] < n_k:
        raise UnsupportedError(
            f"{type(module).__name__}: the cache has dropped keys, so that the columns of position_bias no longer match; "
            "generate with a cache that keeps every key."
        )
    bias = bias[..., :n_k]
    if not n_q or not n_k or (not bias.requires_grad and not torch.compiler.is_compiling() and not bool(bias.any())):
        return score
    if torch.compiler.is_compiling() or not torch.equal(bias[..., 1:, 1:], bias[..., :-1, :-1]):
        raise _unreadable(module, bias, "a function of the distance alone, in a call that is not compiled")
    by_distance = torch.cat([bias[0, :, :, 0].flip(1), bias[0, :, 0, 1:]], 1)
    first, last = 1 - n_q - q_offset, n_k - 1 - q_offset
    reach = max(abs(first), abs(last))
    table = relative(functional.pad(by_distance, (first + reach, reach - last)))
    return table if score is None else score + table


def alibi_score(
    bias: Tensor, mask: ModelMask | None, positions: Tensor | None = None, key_columns: Tensor | None = None
) -> Score:
    """ALiBi of a model, `bias` `(B|1, H, columns)` = slope · position of the key, as `alibi(slopes)`, or else as `key_bias`.

    The slopes are read from the bias. The two agree under a causal mask, where positions are those of the keys up to a constant
    in each row; distances keep their precision in a long text. A bias by key remains for padding inside a text, positions
    rounded to 16 bits, masks that look ahead, and inside a graph, where values are unknown.

    Args:
        bias: finite, without gradient; columns beyond the keys of `mask` are empty slots of a cache.
        mask: the model's mask; None where it is the caller's own 4-D mask.
        positions: `(1, columns)` int64, what the slope multiplies, without regard to padding; None: real keys, counted from 0.
        key_columns: the bias of the keys `(B|1, H, n_k)`; None: the first n_k columns.
    """
    n_k = bias.shape[2] if mask is None or mask.n_k is None else mask.n_k
    key_columns = bias[..., :n_k] if key_columns is None else key_columns
    if mask is None or torch.compiler.is_compiling() or not looks_back(mask.pattern):
        return key_bias(key_columns)
    real = None
    if positions is None:
        bias, real = key_columns, mask.key_real
        real = torch.ones(1, n_k, dtype=torch.bool, device=bias.device) if real is None else real
        positions = real.cumsum(1) - 1
        is_gap = ~real & (positions >= 0) & (positions < real.sum(1, keepdim=True) - 1)
        if bool(is_gap.any()):
            return key_bias(key_columns)
    slopes = _slopes(bias, positions, real)
    return key_bias(key_columns) if slopes is None else alibi(slopes)


def _slopes(bias: Tensor, positions: Tensor, real: Tensor | None) -> Tensor | None:
    """`(H,)` slopes with bias = slope · position on the real keys, to the rounding of float32; None where there are none."""
    reach = positions.abs() if real is None else positions.abs() * real
    if not reach.numel():
        return None
    row, column = divmod(int(reach.argmax()), reach.shape[1])
    if not int(reach[row, column]):
        return None
    slopes = bias[min(row, bias.shape[0] - 1), :, column].double() / positions[row, column]
    expected = slopes[:, None] * positions[:, None]
    differs = (bias - expected).abs() > expected.abs() * _ROUNDING
    if real is not None:
        differs &= real[:, None]
    return None if bool(differs.any()) else slopes.to(torch.promote_types(bias.dtype, torch.float32))


def _unreadable(module: nn.Module, bias: object, needed: str) -> UnsupportedError:
    shape = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
    return UnsupportedError(
        f"{type(module).__name__} passes position_bias {shape}; farlight needs {needed}. Use 'eager' for this model or call."
    )
