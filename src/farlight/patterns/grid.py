"""`neighborhood`: windows on grids of two, three or any number of axes, shifted at the border as NATTEN's are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from farlight.errors import PatternError, show
from farlight.patterns.arguments import read_list, whole
from farlight.patterns.expression import Atom, Sizes
from farlight.patterns.spans import Spans

__all__ = ["neighborhood"]


class neighborhood(Atom):
    """Neighborhood attention on a grid of `shape` tokens, in row-major order: on each axis, the keys of the query's window.

    On an axis of length L, with `window` w and dilation d, a query at x sees keys of its own residue mod d. Among these it has
    the place p = x // d of L' = ⌈(L - x mod d) / d⌉, and sees the w places from clamp(p - w // 2, 0, L' - w): at a border the
    window is shifted inwards, so that every query sees w keys. On a causal axis it sees the places p - w + 1 … p, clipped.

    `window`, `dilation` and `causal` are given once or for each axis. Positions beyond the grid see nothing and are not seen.
    Raises PatternError where a window does not fit: w · d > L. Hassani et al. 2023, "Neighborhood Attention Transformer",
    arXiv:2204.07143; dilation: arXiv:2209.15001; causal axes: arXiv:2403.04690.

    >>> import farlight as fl
    >>> fl.neighborhood((5,), 3).dense(5).int()[0, 0].tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    >>> fl.neighborhood((56, 56), 7, dilation=4).count(56 * 56) == 56 * 56 * 49
    True
    """

    shape: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    def __init__(self, shape: Any, window: Any, dilation: Any = 1, causal: Any = False) -> None:
        grid = tuple(whole("neighborhood: shape", n, 1) for n in read_list("neighborhood", shape, "axis lengths"))
        if not grid:
            raise PatternError("neighborhood: shape has no axis; give one length for each, such as (height, width).")
        whole("neighborhood: tokens of the grid", math.prod(grid), 1)
        windows = tuple(whole("neighborhood: window", w, 1) for w in _by_axis("window", window, len(grid)))
        dilations = tuple(whole("neighborhood: dilation", d, 1) for d in _by_axis("dilation", dilation, len(grid)))
        causals = _by_axis("causal", causal, len(grid))
        for value in causals:
            if not isinstance(value, bool):
                raise PatternError(f"neighborhood: causal = {show(value)}; give True or False, or one of them for each axis.")
        for length, w, d in zip(grid, windows, dilations, strict=True):
            if w * d > length:
                raise PatternError(
                    f"neighborhood: a window of {w} with dilation {d} needs {w * d} tokens, but the axis has {length}; make it "
                    "smaller."
                )
        self._set(shape=grid, window=windows, dilation=dilations, causal=causals, tables=())
        options = "".join(
            f", {name}={_shortest(values)}"
            for name, values, default in (("dilation", dilations, 1), ("causal", causals, False))
            if set(values) != {default}
        )
        self._set(text=f"neighborhood({list(grid)}, {_shortest(windows)}{options})")

    def _needs_length(self) -> str | None:
        return f"neighborhood is defined on {math.prod(self.shape)} tokens"

    def check(self, sizes: Sizes) -> None:
        if sizes.n_k < math.prod(self.shape):
            raise PatternError(
                f"neighborhood: a grid of {self.shape} has {math.prod(self.shape)} tokens, but there are {sizes.n_k} keys."
            )

    def _coordinates(self, position: Tensor) -> list[Tensor]:
        """The place of each position on each axis; of positions beyond the grid those of some place in it."""
        rest, out = position.clamp(0, math.prod(self.shape) - 1), []
        for length in reversed(self.shape):
            out.append(rest % length)
            rest = rest // length
        return out[::-1]

    def _ranges(self, i: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(residue, first, last) on each axis: the keys residue + d · p for first <= p <= last."""
        out = []
        for x, length, w, d, causal in zip(
            self._coordinates(i), self.shape, self.window, self.dilation, self.causal, strict=True
        ):
            residue, place = x % d, x // d
            if causal:
                out.append((residue, (place - w + 1).clamp(min=0), place))
                continue
            count = (length - residue + d - 1) // d
            first = torch.minimum((place - w // 2).clamp(min=0), count - w)
            out.append((residue, first, first + w - 1))
        return out

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        tokens = math.prod(self.shape)
        allowed = (i >= 0) & (i < tokens) & (j < tokens)
        for (residue, first, last), y, d in zip(self._ranges(i), self._coordinates(j), self.dilation, strict=True):
            place = y // d
            allowed = allowed & (y % d == residue) & (place >= first) & (place <= last)
        return allowed

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        *outer, (residue, first, last) = self._ranges(i)
        base = torch.zeros(i.numel(), 1, dtype=torch.int64, device=i.device)
        exists = ((i >= 0) & (i < math.prod(self.shape)))[:, None]
        for (of_axis, begin, end), length, w, d in zip(outer, self.shape, self.window, self.dilation, strict=False):
            place = begin[:, None] + torch.arange(w, device=i.device)
            base = ((base * length)[:, :, None] + (of_axis[:, None] + d * place)[:, None]).flatten(1)
            exists = (exists[:, :, None] & (place <= end[:, None])[:, None]).flatten(1)
        base = base * self.shape[-1]
        if self.dilation[-1] == 1:
            lo, hi = base + first[:, None], base + last[:, None] + 1
        else:
            place = first[:, None] + torch.arange(self.window[-1], device=i.device)
            lo = (base[:, :, None] + (residue[:, None] + self.dilation[-1] * place)[:, None]).flatten(1)
            exists = (exists[:, :, None] & (place <= last[:, None])[:, None]).flatten(1)
            hi = lo + 1
        return Spans.from_table(sizes.n_k, lo, torch.where(exists, hi, lo))

    def _entries_per_row(self, sizes: Sizes) -> int:
        inner = 1 if self.dilation[-1] == 1 else self.window[-1]
        return math.prod(self.window[:-1]) * inner


def _by_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    if isinstance(value, Tensor) and value.dim() == 1:  # the notation reads a list of booleans as one
        value = value.tolist()
    if isinstance(value, (int, float, str)) or not hasattr(value, "__len__"):
        return (value,) * axes
    values = tuple(value)
    if len(values) != axes:
        raise PatternError(f"neighborhood: {name} = {show(value)} has {len(values)} entries for {axes} axes; they must agree.")
    return values


def _shortest(values: tuple[Any, ...]) -> str:
    return repr(values[0]) if len(set(values)) == 1 else repr(list(values))
