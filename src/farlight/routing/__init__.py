"""Routers: modules that choose, from queries and keys, the pattern that attention runs over."""

from farlight.patterns.membership import between, rooms
from farlight.patterns.multi_label import meets
from farlight.patterns.uncovered import unseen
from farlight.routing.base import Router
from farlight.routing.gate import gated_attention
from farlight.routing.gist import gist_attention
from farlight.routing.gist_router import Gist
from farlight.routing.head_routers import PerHeadRouter
from farlight.routing.kmeans import KMeans
from farlight.routing.lsh import LSH
from farlight.routing.notation import read_router
from farlight.routing.topblocks import TopBlocks
from farlight.routing.topkeys import TopKeys, from_indices

__all__ = [
    "LSH",
    "Gist",
    "KMeans",
    "PerHeadRouter",
    "Router",
    "TopBlocks",
    "TopKeys",
    "between",
    "from_indices",
    "gated_attention",
    "gist_attention",
    "meets",
    "read_router",
    "rooms",
    "unseen",
]


def __dir__() -> list[str]:
    """The public names alone: no submodules, no imports."""
    return sorted(__all__)
