"""`farlight.fit`: for each head of one layer the cheapest pattern that keeps enough attention, or the best within a budget.

The stages: profile the full attention of q and k (`profile`), derive each head's options (`candidates`, `greedy`,
`measurements`), allocate one budget of links over the heads (`frontier`), and build the chosen patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.analysis.fit.candidates import fixed_options, parse_candidates
from farlight.analysis.fit.frontier import Option, allocate, concave
from farlight.analysis.fit.measurements import CandidateMeasurements
from farlight.analysis.fit.profile import LayerProfile
from farlight.analysis.notebook import fit_html, head_rows, summary
from farlight.errors import ArgumentError
from farlight.patterns import parse, per_head
from farlight.patterns.algebra import looks_back
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router
from farlight.routing.notation import is_router, read_router
from farlight.score.terms import Score

__all__ = ["Fit", "fit", "head_options", "layer_fit", "read_target"]

# Distinct patterns that a printed fit lists.
_PRINTED = 8


@dataclass(frozen=True, repr=False)
class Fit:
    """A pattern for each head of one layer. Returned by `farlight.fit`.

    Attributes:
        heads: for each head a pattern, or the expression of a router (see `farlight.routing.read_router`).
        families: for each head the candidate family of its pattern.
        kept: `(H,)` float64, the share of full attention probability kept, mean over texts and rows.
        links, base_links: `(H,)` float64, pairs in one text, of the pattern and of full attention.
        frontiers: for each head `(points, 2)` float64, (links, kept) of the candidates on its concave hull.
    """

    heads: tuple[Pattern | str, ...]
    families: tuple[str, ...]
    kept: Tensor
    links: Tensor
    base_links: Tensor
    frontiers: tuple[Tensor, ...]

    @property
    def pattern(self) -> Pattern | Router:
        """All heads as one pattern, `per_head([…])`; a router where some head has one."""
        if all(isinstance(head, Pattern) for head in self.heads):
            return combine_heads([head for head in self.heads if isinstance(head, Pattern)])
        return read_router(self.expression)

    @property
    def expression(self) -> str:
        """All heads as one expression for `farlight.routing.read_router`."""
        texts = [head if isinstance(head, str) else repr(head) for head in self.heads]
        return texts[0] if len(set(texts)) == 1 else f"per_head([{', '.join(texts)}])"

    def on(self, q: Tensor, k: Tensor) -> Pattern:
        """The pattern for q `(B, H, n_q, D)` and k `(B, H_kv, n_k, D)`; routers choose here."""
        pattern = self.pattern
        return pattern(q, k) if isinstance(pattern, Router) else pattern

    @property
    def lost(self) -> Tensor:
        """`(H,)` float64: 1 - kept."""
        return 1 - self.kept

    @property
    def density(self) -> float:
        """Σ links / Σ base_links over heads."""
        return float(self.links.sum() / self.base_links.sum().clamp(min=1))

    @property
    def mass(self) -> float:
        """Mean of `kept` over heads."""
        return float(self.kept.mean())

    def __repr__(self) -> str:
        return f"<Fit of {len(self.heads)} heads: {summary(self)}>"

    def __str__(self) -> str:
        rows = list(head_rows(self))
        lines = [
            f"head{'s' * (not heads.isdecimal())} {heads}: {links:.1%} of the links keep {kept:.1%}  "
            + (text if len(text) <= 80 else text[:79] + "…")
            for heads, text, links, kept in rows[:_PRINTED]
        ]
        more = [f"… {len(rows) - _PRINTED} more patterns"] if len(rows) > _PRINTED else []
        return "\n".join([summary(self), *lines, *more])

    def _repr_html_(self) -> str:
        return fit_html(self)


def fit(
    q: Tensor,
    k: Tensor,
    *,
    keep: float | None = None,
    density: float | None = None,
    candidates: Sequence[str | Pattern] | None = None,
    base: Pattern | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    score: Score | None = None,
    sinks: Tensor | None = None,
    even: bool = False,
) -> Fit:
    """For each head the cheapest candidate such that `keep` of full attention is kept, or the most within `density`.

    With kept_h(c) and links_h(c) the share and the pairs of candidate c in head h, minimises Σ_h links_h(c_h) subject to
    mean_h kept_h(c_h) >= keep, or maximises Σ_h kept_h(c_h) subject to Σ_h links_h(c_h) <= density · Σ_h base_links_h. The
    budget is allocated over heads by water-filling on their concave hulls (`frontier.allocate`), within one step of one head of
    the optimum.

    Args:
        q: `(B, H, n_q, D)`; k: `(B, H_kv, n_k, D)`. The B texts are fitted together.
        keep: share of full attention to keep, mean over heads and rows; 0.95 when neither target is given.
        density: links as a share of those of full attention. One of keep and density.
        candidates: names of families, patterns, expressions of patterns or routers (see `read_router`). Families:
            "window", "dilated", "strided", "offsets" (the default): windows of any width, dilated, with a stride, any
            distances; each joined with the global keys (`seen_by_all`) that pay for their links.
            "blocks", "pairs": any cells of 8 x 8, any pairs ("pairs" up to 1024 tokens); for this text length only.
            "topblocks": blocks of 4 keys chosen by content. With a fixed family, `full()` is a candidate too.
        base: the pairs of full attention; None means every pair. Run the result intersected with it.
        scale, q_offset, score, sinks: as in `fl.attention`. Every candidate keeps a row's sink.
        even: value a row's share as 1 - (1 - share)², so that rows that keep little come first. With `density` only.

    Raises:
        ArgumentError: tensors that do not fit, a target outside (0, 1], unknown candidates, or none that reaches it.

    >>> import torch, farlight as fl
    >>> q = torch.eye(32).view(1, 1, 32, 32) * 60
    >>> k = q.roll(-3, 2)                                   # query i attends to key i - 3
    >>> fl.fit(q, k, keep=0.9).heads[0]
    offsets([-3])
    """
    keep, density = read_target(keep, density, even)
    families, expressions = parse_candidates(candidates, causal=base is not None and looks_back(base))
    profile, measurements = LayerProfile(), CandidateMeasurements(expressions)
    problem: dict[str, Any] = {"base": base, "scale": scale, "q_offset": q_offset, "score": score, "sinks": sinks}
    profile.add(q, k, **problem)
    if expressions:
        measurements.add(q, k, **problem)
    options, base_links = head_options(profile, measurements, families, even)
    budget = None if density is None else density * float(base_links.sum())
    return layer_fit(options, allocate(options, keep=keep, links=budget), base_links)


def read_target(keep: float | None, density: float | None, even: bool) -> tuple[float | None, float | None]:
    """The validated target (keep, density), exactly one of them a number. Raises ArgumentError."""
    if keep is not None and density is not None:
        raise ArgumentError(f"keep = {keep} and density = {density}: give one of them; the other follows.")
    if keep is None and density is None:
        keep = 0.95
    for name, value in (("keep", keep), ("density", density)):
        if value is not None and not 0.0 < value <= 1.0:
            raise ArgumentError(f"{name} = {value}: it must be a share, 0 < {name} <= 1.")
    if even and keep is not None:
        raise ArgumentError(f"even=True with keep = {keep}: keep counts plain shares; give density, or leave even out.")
    return keep, density


def head_options(
    profile: LayerProfile, measurements: CandidateMeasurements, families: Sequence[str], even: bool
) -> tuple[list[list[Option]], Tensor]:
    """The options of each head of a layer, and the links of each head's full attention, `(H,)` float64."""
    assert profile.shape is not None
    num_heads, num_rows = profile.shape[:2]
    options: list[list[Option]] = []
    base_links = []
    for head in range(num_heads):
        head_profile = profile.head(head)
        options.append(fixed_options(head_profile, families, even) + measurements.options(head, num_rows, even))
        base_links.append(float(head_profile.distance_links.sum()))
    return options, torch.tensor(base_links, dtype=torch.float64, device="cpu")


def layer_fit(options: Sequence[Sequence[Option]], chosen: Sequence[Option], base_links: Tensor) -> Fit:
    """The `Fit` of one layer from its heads' options and the chosen one of each."""
    hulls = [concave([Option(o.links, o.kept, o.kept, o.make) for o in head]) for head in options]
    return Fit(
        tuple(_build(option) for option in chosen),
        tuple(option.family for option in chosen),
        torch.tensor([option.kept for option in chosen], dtype=torch.float64, device="cpu"),
        torch.tensor([option.links for option in chosen], dtype=torch.float64, device="cpu"),
        base_links,
        tuple(torch.tensor([[o.links, o.kept] for o in hull], dtype=torch.float64, device="cpu") for hull in hulls),
    )


def _build(option: Option) -> Pattern | str:
    """The option's pattern, or its expression where that contains a router."""
    head = option.make()
    assert isinstance(head, Pattern | str)
    return parse(head) if isinstance(head, str) and not is_router(head) else head


def combine_heads(patterns: Sequence[Pattern]) -> Pattern:
    """`per_head(patterns)`, or the pattern itself where all heads have the same."""
    return patterns[0] if len(set(patterns)) == 1 else per_head(patterns)
