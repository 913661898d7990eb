"""The patterns that are measured: every preset, and the building blocks that could cost more than they keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import torch

from farlight.errors import PatternError
from farlight.patterns import causal, clusters, documents, global_tokens, per_head, presets, random_keys, window
from farlight.patterns.expression import Pattern, Sizes

__all__ = ["PLAIN", "Shown", "clusters_of", "gallery", "presets_shown"]

PLAIN = "window(256)"
_DOCUMENTS = (300, 1800, 90, 4000, 700, 2500, 150, 1200)


@dataclass(frozen=True)
class Shown:
    """A named pattern. Causal ones are compared with causal dense attention, which does half the work."""

    name: str
    pattern: Pattern
    causal: bool = False

    def misfit(self, n: int, heads: int) -> str | None:
        """Why it does not fit a text of n tokens; None when it does."""
        try:
            self.pattern.check(Sizes.of(n, heads=heads))
        except PatternError as error:
            return str(error)
        return None


def gallery(n: int, heads: int) -> Iterator[Shown]:
    """All of them for n tokens; the plain window, with which the others are compared, comes first."""
    mixed = (window(256), window(64, dilation=4), window(128) | random_keys(3), window(128) | global_tokens([0, -1]))
    text = documents(lengths=_lengths(n))
    yield Shown(PLAIN, window(256))
    yield Shown("window(256) | global_tokens(range(64))", window(256) | global_tokens(range(64)))
    yield Shown("window(256) | random_keys(3)", window(256) | random_keys(3))
    yield Shown("window(256, dilation=4)", window(256, dilation=4))
    yield clusters_of(n, 512)
    yield Shown("four kinds of heads", per_head(list(islice(cycle(mixed), heads))))
    yield Shown("packed documents", text)
    yield Shown("packed documents, causal", text & causal(), causal=True)
    yield from presets_shown()


def presets_shown() -> Iterator[Shown]:
    """Every preset at its paper's sizes."""
    yield Shown("longformer(512)", presets.longformer(512))
    yield Shown("longformer(512, dilation=4)", presets.longformer(512, dilation=4))
    yield Shown("bigbird(64, 3)", presets.bigbird(64, 3))
    yield Shown("etc(84, 230)", presets.etc(84, 230))
    yield Shown("sparse_transformer(128, 'strided')", presets.sparse_transformer(128), causal=True)
    yield Shown("sparse_transformer(128, 'fixed')", presets.sparse_transformer(128, "fixed"), causal=True)
    segments, dilations = [2048, 4096, 8192, 16384], [1, 2, 4, 8]
    yield Shown(f"longnet({segments}, {dilations})", presets.longnet(segments, dilations))
    yield Shown("streaming(4, 1024)", presets.streaming(4, 1024), causal=True)
    yield Shown("star()", presets.star())
    yield Shown("logsparse()", presets.logsparse(), causal=True)


def clusters_of(n: int, size: int) -> Shown:
    """Tokens scattered over rooms of `size`, balanced, the same in every head."""
    rooms = max(1, n // size)
    labels = torch.randperm(n, generator=torch.Generator().manual_seed(0)) % rooms
    return Shown(f"clusters of {size}", clusters(labels))


def _lengths(n: int) -> list[int]:
    """Documents of very unequal lengths that fill a text of n tokens."""
    lengths: list[int] = []
    for length in cycle(_DOCUMENTS):
        rest = n - sum(lengths)
        if rest <= 0:
            return lengths
        lengths.append(min(length, rest))
    return lengths
