"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators: the products over the allowed pairs.

A multiplication and an addition are two, as in torch's own counts; softmax, masked pairs of visited tiles and planning are not
counted. The backward pass computes the scores again: five products where the forward pass has two.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from farlight.errors import UnsupportedError
from farlight.kernels.counting import count_links
from farlight.patterns.expression import Sizes
from farlight.patterns.notation import parse

__all__ = ["register"]


def _pairs(q: Tensor, k: Tensor, tables: Sequence[Tensor], pattern: str, q_offset: int) -> int:
    if any(isinstance(table, torch._subclasses.FakeTensor) for table in tables):
        raise UnsupportedError(
            f"FlopCounterMode: the pattern {pattern!r} has tables, and fake tensors hold no numbers from which its pairs could "
            "be counted. Count with real tensors."
        )
    with _disable_current_modes():  # counting computes, which under fake tensors nothing does
        return count_links(parse(pattern, tuple(tables)), Sizes(q.shape[2], k.shape[2], q_offset, q.shape[0], q.shape[1]))


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any = None) -> int:
    tables, _, pattern, _, q_offset, *_ = rest
    return _pairs(q, k, tables, pattern, q_offset) * 2 * (q.shape[3] + v.shape[3])


def _backward(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any = None) -> int:
    _, _, tables, _, pattern, _, q_offset, *_ = rest
    return _pairs(q, k, tables, pattern, q_offset) * 2 * (3 * q.shape[3] + 2 * v.shape[3])


def _forward_scored(q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any = None) -> int:
    return _forward(q, k, v, *rest[3:])


def _backward_scored(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any = None) -> int:
    return _backward(dout, dlse, q, k, v, *rest[3:])


def _link_sums(rows: Tensor, keys: Tensor, *rest: Any, out_val: Any = None) -> int:
    """Five products of the tangents of `attend`, five of its gradients; the derivative of a product is two more."""
    _, tables, _, pattern, kind, (head_dim, value_dim, *_), _, q_offset, *_ = rest
    products: int = (3 * head_dim + 2 * value_dim) * 3 ** len(kind.partition(".")[2])
    return _pairs(rows, keys, tables, pattern, q_offset) * 2 * products


def register() -> None:
    """Make the formulas known to the counter, where it is loaded: importing it would import Triton."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    registry = counter.flop_registry
    operators = torch.ops.farlight
    if operators.attend not in registry:
        counter.register_flop_formula(operators.attend, get_raw=True)(_forward)
        counter.register_flop_formula(operators.attend_backward, get_raw=True)(_backward)
        counter.register_flop_formula(operators.attend_scored, get_raw=True)(_forward_scored)
        counter.register_flop_formula(operators.attend_scored_backward, get_raw=True)(_backward_scored)
        counter.register_flop_formula(operators.link_sums, get_raw=True)(_link_sums)
    # A counter copies the formulas when it is made, which may have been before.
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            for name in ("attend", "attend_backward", "attend_scored", "attend_scored_backward", "link_sums"):
                operator = getattr(operators, name)
                mode.counter.flop_registry.setdefault(operator, registry[operator])
