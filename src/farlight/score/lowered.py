"""From a score to what kernels read: a cap, one table of biases by distance, one of biases by key, and sinks.

Every bias by distance is a function of the head and of j - i, so that any sum of them is one table `(H, L)` over the distances
`first … first + L - 1`, clipped at both ends. Lowering is plain torch: gradients of the two tables flow on to slopes and to
learned tables by autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.errors import ArgumentError
from farlight.patterns.expression import Sizes
from farlight.score.terms import Alibi, KeyBias, RelativeTable, Score, Softcap, T5Table

__all__ = ["ALL_TERMS", "ScoreTerms", "alibi_slopes", "by_distance", "lower", "t5_buckets"]

ALL_TERMS = frozenset({"softcap", "bias by distance", "bias by key", "sinks"})


@dataclass(frozen=True, eq=False, slots=True)
class ScoreTerms:
    """S = cap · tanh(scale · q kᵀ / cap) + distance[h, clip(j - i - first, 0, L - 1)] + key_bias[b, h, j]: of one call.

    cap: 0 = none. distance `(H, L)`, key_bias `(B|1, H|1, n_k)`, sinks `(H,)`: float32, for float64 inputs float64; or None.
    """

    cap: float = 0.0
    first: int = 0
    distance: Tensor | None = None
    key_bias: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def names(self) -> frozenset[str]:
        """The kinds of terms, as backends declare them: "softcap", "bias by distance", "bias by key", "sinks"."""
        tensors = {"bias by distance": self.distance, "bias by key": self.key_bias, "sinks": self.sinks}
        return frozenset(({"softcap"} if self.cap else set()) | {name for name, x in tensors.items() if x is not None})

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are there."""
        return tuple(x for x in (self.distance, self.key_bias, self.sinks) if x is not None)

    def capped(self, scores: Tensor) -> Tensor:
        """cap · tanh(scores / cap), or the scores."""
        return self.cap * torch.tanh(scores / self.cap) if self.cap else scores

    def under(self, scores: Tensor, items: slice, heads: slice, rows: slice, keys: Tensor, q_offset: int) -> Tensor:
        """S of scale · q kᵀ `(B', H', rows, keys)`, a part of a problem: its batch items, query heads, query rows and keys."""
        scores = self.capped(scores)
        if self.distance is not None:
            i = torch.arange(rows.start, rows.stop, device=keys.device)[:, None] + (q_offset + self.first)
            scores = scores + by_distance(self.distance[heads], (keys - i).clamp(0, self.distance.shape[1] - 1))
        if self.key_bias is not None:
            bias = self.key_bias if self.key_bias.shape[0] == 1 else self.key_bias[items]
            bias = bias if bias.shape[1] == 1 else bias[:, heads]
            scores = scores + bias[:, :, keys].unsqueeze(2)
        return scores

    def bias(self, n_q: int, n_k: int, q_offset: int) -> Tensor | None:
        """All biases `(B|1, H|1, n_q, n_k)`; None without any. Memory n_q · n_k."""
        total = None
        if self.distance is not None:
            device = self.distance.device
            j, i = torch.arange(n_k, device=device), torch.arange(n_q, device=device)[:, None] + q_offset
            total = by_distance(self.distance, (j - i - self.first).clamp(0, self.distance.shape[1] - 1))[None]
        if self.key_bias is not None:
            of_keys = self.key_bias[:, :, None]
            total = of_keys if total is None else total + of_keys
        return total


def by_distance(table: Tensor, index: Tensor) -> Tensor:
    """table[:, index]; the gradient is summed in a fixed order on every device."""
    if table.device.type == "cpu":  # there the gradient of an index is summed by all threads at once
        return table.gather(1, index.reshape(1, -1).expand(table.shape[0], -1)).view(-1, *index.shape)
    return table[:, index]


def lower(
    score: Score | None, sinks: Tensor | None, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> ScoreTerms | None:
    """The terms of `score` and `sinks` for these sizes, for tensors of `dtype`; None without any. Raises ArgumentError."""
    if score is None and sinks is None:
        return None
    if score is not None and not isinstance(score, Score):
        raise ArgumentError(f"score is {type(score).__name__}; pass a value of fl.score, such as fl.score.alibi(slopes).")
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    cap, tables, of_keys = 0.0, [], None
    for term in () if score is None else score.terms:
        if isinstance(term, Softcap):
            cap = term.cap
        elif isinstance(term, KeyBias):
            bias = _checked(term.bias, "key_bias", device).to(exact)
            fits = bias.shape[0] in (1, sizes.batch) and bias.shape[1] in (1, sizes.heads) and bias.shape[2] == sizes.n_k
            _require(fits, "key_bias", bias, f"(B or 1, H or 1, n_k) = ({sizes.batch}, {sizes.heads}, {sizes.n_k})")
            of_keys = bias if of_keys is None else of_keys + bias
        else:
            tables.append(_distance_table(term, sizes, device, exact))
    first, distance = _sum(tables) if tables else (0, None)
    if sinks is not None:
        if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
            raise ArgumentError(f"sinks is {type(sinks).__name__}; pass a floating-point tensor (H,).")
        _require(sinks.shape == (sizes.heads,), "sinks", sinks, f"(H,) = ({sizes.heads},)")
        sinks = _checked(sinks, "sinks", device).to(exact)
    return ScoreTerms(cap, first, distance, of_keys, sinks)


def _distance_table(
    term: Alibi | RelativeTable | T5Table, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> tuple[int, Tensor]:
    """(first distance, table `(H, L)`) of one term; distances beyond either end have the value of that end."""
    if isinstance(term, Alibi):
        slopes = alibi_slopes(term, sizes, device, dtype)
        first = 1 - sizes.n_q - sizes.q_offset
        last = torch.sym_max(sizes.n_k - 1 - sizes.q_offset, first)
        distances = torch.arange(first, last + 1, device=device, dtype=dtype)
        return first, -slopes[:, None] * distances.abs()
    if isinstance(term, RelativeTable):
        table = _checked(term.table, "relative", device)
        _require(table.shape[0] == sizes.heads, "relative: table", table, f"(H, 2R + 1) with H = {sizes.heads}")
        return -(table.shape[1] // 2), table.to(dtype)
    table = _checked(term.table, "t5", device)
    _require(table.shape[1] == sizes.heads, "t5: table", table, f"(buckets, H) with H = {sizes.heads}")
    reach = term.max_distance
    buckets = t5_buckets(torch.arange(-reach, reach + 1, device=device), term.buckets, term.max_distance, term.bidirectional)
    # A product: its gradient is summed in a fixed order, which that of an index with repetitions is not on every device.
    chosen = (buckets == torch.arange(term.buckets, device=device)[:, None]).to(dtype)
    return -reach, table.to(dtype).T @ chosen


def alibi_slopes(term: Alibi, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The slopes `(H,)` in dtype. Raises ArgumentError."""
    slopes = _checked(term.slopes, "alibi", device)
    _require(slopes.shape == (sizes.heads,), "alibi: slopes", slopes, f"(H,) = ({sizes.heads},)")
    return slopes.to(dtype)


def t5_buckets(distances: Tensor, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """The bucket of each distance j - i, as T5 assigns them."""
    first = torch.zeros_like(distances)
    if bidirectional:
        buckets //= 2
        first, size = (distances > 0).long() * buckets, distances.abs()
    else:
        size = (-distances).clamp(min=0)
    exact = buckets // 2
    # In float32, as T5 computes them: a bucket's edge must not move by a rounding.
    logarithm = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    return first + torch.where(size < exact, size, (exact + logarithm.long()).clamp(max=buckets - 1))


def _sum(tables: list[tuple[int, Tensor]]) -> tuple[int, Tensor]:
    """The sum of tables over the distances of all of them."""
    if len(tables) == 1:
        return tables[0]
    first, end = tables[0][0], tables[0][0] + tables[0][1].shape[1]
    for begin, table in tables[1:]:
        first, end = torch.sym_min(first, begin), torch.sym_max(end, begin + table.shape[1])
    total = _widened(*tables[0], first, end)
    for begin, table in tables[1:]:
        total = total + _widened(begin, table, first, end)
    return first, total


def _widened(begin: int, table: Tensor, first: int, end: int) -> Tensor:
    """The table over the distances `first … end - 1`, its ends repeated."""
    heads = table.shape[0]
    left, right = begin - first, end - begin - table.shape[1]
    return torch.cat([table[:, :1].expand(heads, left), table, table[:, -1:].expand(heads, right)], 1)


def _checked(x: Tensor, what: str, device: torch.device) -> Tensor:
    if x.device != device:
        raise ArgumentError(f"{what}: the tensor is on {x.device}, q on {device}; move them to one device.")
    # Elsewhere the check would wait for the device, or find no numbers.
    if (
        device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and _is_concrete(x)
    ):
        bad = ~x.detach().isfinite()
        if bool(bad.any()):
            raise ArgumentError(
                f"{what}: {int(bad.sum())} of {x.numel()} numbers are not finite; hide keys by the pattern instead."
            )
    return x


def _is_concrete(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _require(fits: bool, what: str, x: Tensor, needed: str) -> None:
    if not fits:
        raise ArgumentError(f"{what} has shape {tuple(x.shape)}; for these q, k and v it must be {needed}.")
