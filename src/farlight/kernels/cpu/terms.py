"""Score terms as the native kernels read them: tables in base 2, the one by distance stored by i - j with its ends repeated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from farlight.kernels.backend import ScoreGrads
from farlight.kernels.sinks import gradient_of_delta
from farlight.score.lowered import ScoreTerms

__all__ = ["NativeTerms"]

_LOG2E = math.log2(math.e)
_REPEATED = 31  # kRows - 1 of csrc/views.h: the biases of a key for any 32 consecutive rows are one load


class NativeTerms:
    """The terms of one call; owns what `arguments` gives the addresses of."""

    def __init__(self, terms: ScoreTerms, batch: int, heads: int, *, with_sinks: bool = False) -> None:
        self.terms, self.batch, self.heads = terms, batch, heads
        self._distance = self._key_bias = self._sinks = None
        self.lowest = 0
        if terms.distance is not None:
            table = terms.distance.detach() * _LOG2E
            ends = (heads, _REPEATED)
            self._distance = torch.cat([table[:, -1:].expand(ends), table.flip(1), table[:, :1].expand(ends)], 1)
            self.lowest = -(terms.first + table.shape[1] - 1)
        if terms.key_bias is not None:
            self._key_bias = (terms.key_bias.detach() * _LOG2E).contiguous()
        if terms.sinks is not None and with_sinks:
            self._sinks = (terms.sinks.detach() * _LOG2E).contiguous()
        self.d_distance: Tensor | None = None
        self.d_key_bias: Tensor | None = None
        self.delta: Tensor | None = None

    def want_gradients(self, wanted: tuple[bool, bool, bool], dlse: Tensor) -> None:
        """Allocate what the backward pass writes for the gradients of distance, key_bias and sinks."""
        distance, key_bias, sinks = wanted
        if sinks and self.terms.sinks is not None:
            self.delta = (-dlse).to(torch.float32).contiguous()  # what it is in a row that no tile visits
        if distance and self._distance is not None:
            self.d_distance = torch.zeros_like(self._distance)
        if key_bias and self._key_bias is not None:
            self.d_key_bias = torch.zeros(self.batch, self.heads, self._key_bias.shape[2], device="cpu")

    def arguments(self) -> tuple[list[int], float]:
        """(addresses, lengths and strides in the order of csrc/binding.cpp, the cap in base 2)."""
        distance, key_bias = self._distance, self._key_bias
        strides = (0, 0) if key_bias is None else tuple(key_bias.stride(d) if key_bias.shape[d] > 1 else 0 for d in (0, 1))
        addresses = [
            _address(distance),
            0 if distance is None else distance.shape[1],
            self.lowest,
            _address(key_bias),
            *strides,
            *(_address(x) for x in (self._sinks, self.d_distance, self.d_key_bias, self.delta)),
        ]
        return addresses, self.terms.cap * _LOG2E

    def gradients(self, lse: Tensor) -> ScoreGrads:
        """The gradients of distance, key_bias and sinks, in their shapes; None where none was wanted."""
        of_distance, of_keys, given = self.d_distance, self.d_key_bias, self.terms.key_bias
        if of_distance is not None:
            # The repeated ends belong to the first and last column; then by j - i again.
            inner = of_distance[:, _REPEATED:-_REPEATED].clone()
            inner[:, 0] += of_distance[:, :_REPEATED].sum(1)
            inner[:, -1] += of_distance[:, -_REPEATED:].sum(1)
            of_distance = inner.flip(1)
        if of_keys is not None and given is not None:
            shared = tuple(d for d in (0, 1) if given.shape[d] == 1)
            of_keys = of_keys.sum(shared, keepdim=True) if shared else of_keys
        sinks, of_sinks = self.terms.sinks, None
        if sinks is not None and self.delta is not None:
            of_sinks = gradient_of_delta(self.delta, lse, sinks)
        return of_distance, of_keys, of_sinks


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
