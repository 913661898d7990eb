"""The heaviest lost links of several patterns, each once, with the patterns that lose it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farlight.analysis.candidates_by_layer import Subject
from farlight.analysis.loss.top_losses import LostLink
from farlight.patterns.expression import Pattern

__all__ = ["SharedLoss", "shared_losses"]


@dataclass(frozen=True)
class SharedLoss:
    """A link and the patterns, by their index, that lose it in its layer and head."""

    link: LostLink
    patterns: tuple[int, ...]


def shared_losses(
    candidates: Sequence[Subject], lost: Sequence[Sequence[LostLink]], n: int, count: int
) -> tuple[SharedLoss, ...]:
    """The `count` heaviest links of all lists, each pair of tokens once; `lost[c]`: the lost links of candidate c.

    A pattern is asked whether it allows the link, whether its own list is long enough to name it or not; a router, whose choice
    is no longer known, counts where its list names the pair. n: tokens in a passage.
    """
    heaviest: dict[tuple[int, int, int], LostLink] = {}
    listing: dict[tuple[int, int, int], set[int]] = {}
    for index, links in enumerate(lost):
        for link in links:
            pair = link.text, link.query, link.key
            listing.setdefault(pair, set()).add(index)
            if pair not in heaviest or link.probability > heaviest[pair].probability:
                heaviest[pair] = link
    chosen = sorted(heaviest.items(), key=lambda item: -item[1].probability)[:count]
    return tuple(
        SharedLoss(link, tuple(i for i, c in enumerate(candidates) if _loses(c, link, n, i in listing[pair])))
        for pair, link in chosen
    )


def _loses(candidate: Subject, link: LostLink, n: int, is_listed: bool) -> bool:
    """Whether a candidate loses the link in its layer and head."""
    pattern = candidate.at(link.layer or 0)
    if pattern is None:
        return False
    if isinstance(pattern, Pattern) and not pattern.varies_over_batch and min(link.query, link.key) >= 0:
        return not pattern.allows(link.query, link.key, n, head=link.head)
    return is_listed
