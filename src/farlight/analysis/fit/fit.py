"""`farlight.fit`: for each head the cheapest pattern that keeps enough of its attention, or the best one within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.analysis.fit.candidates import fixed_options, sorted_out
from farlight.analysis.fit.frontier import Option, allocate, concave
from farlight.analysis.fit.measurements import Measured
from farlight.analysis.fit.profile import Profile
from farlight.errors import ArgumentError
from farlight.patterns import parse, per_head
from farlight.patterns.algebra import looks_back
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router
from farlight.routing.notation import is_router, read_router

__all__ = ["Fit", "fit", "gathered", "head_options", "read_target"]


@dataclass(frozen=True)
class Fit:
    """A pattern for each head of one layer. Returned by `farlight.fit`.

    Attributes:
        heads: for each head a pattern, or, where content decides, the expression of a router (see `read_router`).
        families: for each head the family of candidates that its pattern comes from.
        kept: `(H,)` float64, the share of full attention probability kept, mean over texts and rows.
        links, base_links: `(H,)` float64, pairs in one text, allowed by the pattern and looked at by full attention.
        frontiers: for each head `(points, 2)` float64: (links, kept) of the candidates that are best at some price.
    """

    heads: tuple[Pattern | str, ...]
    families: tuple[str, ...]
    kept: Tensor
    links: Tensor
    base_links: Tensor
    frontiers: tuple[Tensor, ...]

    @property
    def pattern(self) -> Pattern | Router:
        """All heads as one: `per_head([…])`, or a router where content decides in some head."""
        if all(isinstance(head, Pattern) for head in self.heads):
            return joined_heads([head for head in self.heads if isinstance(head, Pattern)])
        return read_router(self.expression)

    @property
    def expression(self) -> str:
        """All heads as text that `farlight.routing.read_router` reads."""
        texts = [head if isinstance(head, str) else repr(head) for head in self.heads]
        return texts[0] if len(set(texts)) == 1 else f"per_head([{', '.join(texts)}])"

    def on(self, q: Tensor, k: Tensor) -> Pattern:
        """The pattern for these queries and keys: where content decides, the choice is made here."""
        pattern = self.pattern
        return pattern(q, k) if isinstance(pattern, Router) else pattern

    @property
    def lost(self) -> Tensor:
        """`(H,)`: the share of full attention that is lost."""
        return 1 - self.kept

    @property
    def density(self) -> float:
        """Links over all heads, as a share of those of full attention."""
        return float(self.links.sum() / self.base_links.sum().clamp(min=1))

    @property
    def mass(self) -> float:
        """`kept`, mean over heads."""
        return float(self.kept.mean())

    def __str__(self) -> str:
        lines = [f"{self.density:.1%} of all links keep {self.mass:.1%} of full attention"]
        for number, head in enumerate(self.heads):
            text = head if isinstance(head, str) else repr(head)
            share = float(self.links[number] / self.base_links[number].clamp(min=1))
            text = text if len(text) <= 80 else text[:79] + "…"
            lines.append(f"head {number:2d}: {share:6.1%} of its links keep {float(self.kept[number]):6.1%}  {text}")
        return "\n".join(lines)


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
    even: bool = False,
) -> Fit:
    """For each head the cheapest candidate such that `keep` of full attention is kept, or the most within `density`.

    With kept_h(c) and links_h(c) the share and the pairs of candidate c in head h, it minimises Σ_h links_h(c_h) subject to
    mean_h kept_h(c_h) >= keep, or maximises Σ_h kept_h(c_h) subject to Σ_h links_h(c_h) <= density · Σ_h all links. Heads share
    the budget: flat heads get more of it, local heads less, up to the same price of a link (water-filling over concave
    frontiers; no further from the optimum than one step of one head).

    Args:
        q: `(B, H, n_q, D)`; k: `(B, H_kv, n_k, D)`. The B texts are fitted together.
        keep: share of full attention to keep, mean over heads and rows; the default, 0.95, when neither is given.
        density: links as a share of what full attention looks at. One of keep and density.
        candidates: names of families, patterns, expressions of patterns or routers (see `read_router`). Families:
            "window", "dilated", "strided", "offsets": windows of any width, dilated, with a stride, any distances; each joined
            by the lighthouses (`seen_by_all`) that earn their links. These four are the default.
            "blocks", "pairs": any cells of 8 x 8, any pairs ("pairs" up to 1024 tokens): for this length only.
            "topblocks": blocks of 4 keys chosen by content. Where a fixed family is named, a head may also see everything.
        base: what full attention looks at; None = everything. The patterns are meant to be intersected with it.
        scale, q_offset: as in `fl.attention`.
        even: count a row's share as 1 - (1 - share)², so that rows that keep little come first. With `density` only.

    Raises:
        ArgumentError: tensors that do not fit, a target outside (0, 1], unknown candidates, or none that reaches it.

    >>> import torch, farlight as fl
    >>> q = torch.eye(32).view(1, 1, 32, 32) * 60
    >>> k = q.roll(-3, 2)                                   # key i - 3 answers to query i
    >>> fl.fit(q, k, keep=0.9).heads[0]
    offsets([-3])
    """
    keep, density = read_target(keep, density, even)
    families, expressions = sorted_out(candidates, causal=base is not None and looks_back(base))
    profile, measured = Profile(), Measured(expressions)
    profile.add(q, k, base=base, scale=scale, q_offset=q_offset)
    if expressions:
        measured.add(q, k, base=base, scale=scale, q_offset=q_offset)
    options, base_links = head_options(profile, measured, families, even)
    budget = None if density is None else density * float(base_links.sum())
    return gathered(options, allocate(options, keep=keep, links=budget), base_links)


def read_target(keep: float | None, density: float | None, even: bool) -> tuple[float | None, float | None]:
    """(keep, density), of which exactly one is a number."""
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
    profile: Profile, measured: Measured, families: Sequence[str], even: bool
) -> tuple[list[list[Option]], Tensor]:
    """The options of each head of a layer, and the links that its full attention has."""
    assert profile.shape is not None
    heads, rows = profile.shape[:2]
    options: list[list[Option]] = []
    links = []
    for head in range(heads):
        one = profile.head(head)
        options.append(fixed_options(one, families, even) + measured.options(head, rows, even))
        links.append(float(one.distance_links.sum()))
    return options, torch.tensor(links, dtype=torch.float64, device="cpu")


def gathered(options: Sequence[Sequence[Option]], chosen: Sequence[Option], base_links: Tensor) -> Fit:
    """The chosen options of one layer as a `Fit`."""
    heads = [_made(option) for option in chosen]
    hulls = [concave([Option(o.links, o.kept, o.kept, o.make) for o in head]) for head in options]
    return Fit(
        tuple(heads),
        tuple(option.family for option in chosen),
        torch.tensor([option.kept for option in chosen], dtype=torch.float64, device="cpu"),
        torch.tensor([option.links for option in chosen], dtype=torch.float64, device="cpu"),
        base_links,
        tuple(torch.tensor([[o.links, o.kept] for o in hull], dtype=torch.float64, device="cpu") for hull in hulls),
    )


def _made(option: Option) -> Pattern | str:
    made = option.make()
    assert isinstance(made, Pattern | str)
    # An expression without a router is a pattern.
    return parse(made) if isinstance(made, str) and not is_router(made) else made


def joined_heads(patterns: Sequence[Pattern]) -> Pattern:
    """One pattern where all heads agree, `per_head` otherwise."""
    return patterns[0] if len(set(patterns)) == 1 else per_head(patterns)
