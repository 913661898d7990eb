"""Score terms that a model passes to its attention: softcap (Gemma 2), and T5's position_bias, read as a table by distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from farlight.errors import UnsupportedError
from farlight.score import Score, relative, softcap

__all__ = ["model_score"]


def model_score(module: nn.Module, kwargs: dict[str, Any], num_heads: int, n_q: int, n_k: int, q_offset: int) -> Score | None:
    """The `fl.score` of a call's `softcap` and `position_bias`; None without any. Raises UnsupportedError.

    position_bias `(1, H, n_q, columns)`: a function of the distance of key and query, of which the first row and column are
    read; columns from n_k on are empty slots of a cache. Gradients of the table sum to those of the whole matrix.
    """
    cap, bias = kwargs.get("softcap"), kwargs.get("position_bias")
    score = None if cap is None else softcap(float(cap))
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


def _unreadable(module: nn.Module, bias: object, needed: str) -> UnsupportedError:
    shape = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
    return UnsupportedError(
        f"{type(module).__name__} passes position_bias {shape}; farlight needs {needed}. Use 'eager' for this model or call."
    )
