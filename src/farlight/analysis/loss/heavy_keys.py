"""The heaviest keys of every row of chosen heads: what a token attends to, under full attention and under each candidate.

One run of the model over one passage with its own attention. Of each row the keys kept are the `FULL` heaviest of full
attention and the `EACH` heaviest that each candidate allows, so that both lists of a reader are whole at their heads. Under a
candidate the weight of an allowed key is its full probability over the row's kept share: the softmax of the same scores over
fewer keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.analysis.candidates_by_layer import Judged, Subject, pattern_for, subjects
from farlight.analysis.loss.probabilities import Tile, lowered_terms, sizes_of, tiles
from farlight.errors import ArgumentError
from farlight.hf.interface import Observation, use_pattern
from farlight.hf.layers import attention_layers
from farlight.patterns import full
from farlight.patterns.expression import Pattern, Sizes
from farlight.routing.gist_router import Gist

__all__ = ["EACH", "FULL", "HeavyKeys", "heavy_keys"]

FULL, EACH = 16, 8


@dataclass(frozen=True)
class HeavyKeys:
    """The heaviest keys of one head in one passage of n tokens; row i has entries `first[i]` to `first[i + 1]`, by key.

    Attributes:
        layer, head: which.
        first: `(n + 1,)` int64. key: `(m,)` int64. probability: `(m,)` float32, of full attention.
        allowed: `(candidates, m)` bool. kept: `(candidates, n)` float32, each row's share of full attention on allowed keys
            and its sink; NaN for a candidate that also attends to block summaries, under which weights are not these.
    """

    layer: int
    head: int
    first: Tensor
    key: Tensor
    probability: Tensor
    allowed: Tensor
    kept: Tensor

    def row(self, query: int, candidate: int | None = None) -> list[tuple[int, float]]:
        """(key, weight) of the entries of a row, heaviest first: of full attention, or under a candidate."""
        span = slice(int(self.first[query]), int(self.first[query + 1]))
        weight = self.probability[span].double()
        if candidate is not None:
            weight = torch.where(self.allowed[candidate, span], weight / self.kept[candidate, query].double(), 0.0)
        order = weight.argsort(descending=True, stable=True).tolist()
        keys, weights = self.key[span].tolist(), weight.tolist()
        return [(keys[x], weights[x]) for x in order if weights[x] > 0]


def heavy_keys(
    model: Any, ids: Tensor, patterns: Sequence[Judged | Subject], heads: Sequence[tuple[int, int]]
) -> list[HeavyKeys]:
    """The heaviest keys of these (layer, head) of a Hugging Face model that reads one passage `ids` `(n,)`, in that order.

    patterns: as in `audit`; each is intersected with the model's own mask. Raises ArgumentError for a layer or head that the
    model does not have.
    """
    observer = _Observer(subjects(patterns), heads)
    with torch.no_grad(), use_pattern(model, None, observer=observer):
        observer.numbers = {id(module): number for number, module in attention_layers(model).items()}
        model(ids[None])
    missing = [pair for pair in heads if pair not in observer.result]
    if missing:
        layer, head = missing[0]
        raise ArgumentError(
            f"layer {layer}, head {head}: the model has layers 0 to {observer.layers - 1} with {observer.heads} heads each, "
            "numbered from 0; name one of those."
        )
    return [observer.result[pair] for pair in heads]


class _Observer:
    """Observer of one full-attention pass over one passage: `result[layer, head]`."""

    def __init__(self, candidates: Sequence[Subject], wanted: Sequence[tuple[int, int]]) -> None:
        self.candidates, self.wanted = candidates, set(wanted)
        self.numbers: dict[int, int] = {}
        self.layers = self.heads = 0
        self.result: dict[tuple[int, int], HeavyKeys] = {}

    def __call__(self, call: Observation) -> None:
        layer = self.numbers.get(id(call.module), self.layers)
        self.layers, self.heads = max(self.layers, layer + 1), call.q.shape[1]
        heads = sorted(head for number, head in self.wanted if number == layer and 0 <= head < self.heads)
        if not heads:
            return
        choices = [candidate.at(layer) for candidate in self.candidates]
        chosen = [pattern_for(choice, call.q, call.k, call.key_real) for choice in choices]
        patterns = [full() if pattern is None else pattern for pattern in chosen]
        parts: dict[int, list[_TileEntries]] = {head: [] for head in heads}
        base, sizes = None if call.own == full() else call.own, sizes_of(call.q, call.k, call.q_offset)
        terms = lowered_terms(**call.terms, q=call.q, k=call.k, q_offset=call.q_offset)
        for tile in tiles(call.q, call.k, base, call.scale, sizes, terms):
            for head in heads:
                if tile.heads.start <= head < tile.heads.stop:
                    parts[head].append(_rows(tile, head, patterns, sizes))
        summarised = torch.tensor([isinstance(choice, Gist) for choice in choices])
        for head, rows in parts.items():
            self.result[layer, head] = _joined(layer, head, rows, summarised)


@dataclass(frozen=True)
class _TileEntries:
    """Entries of the rows of one tile: how many each has, and their columns."""

    count: Tensor
    key: Tensor
    probability: Tensor
    allowed: Tensor
    kept: Tensor


def _rows(tile: Tile, head: int, patterns: Sequence[Pattern], sizes: Sizes) -> _TileEntries:
    probability = tile.probability[0, head - tile.heads.start].float()
    listed = torch.zeros_like(probability, dtype=torch.bool)
    masks, kept = [], []
    _list_heaviest(listed, probability, FULL)
    for pattern in patterns:
        mask = tile.mask(pattern, sizes)[0]
        mask = mask[head - tile.heads.start if mask.shape[0] > 1 else 0]
        allowed = probability.masked_fill(~mask, 0.0)
        _list_heaviest(listed, allowed, EACH)
        masks.append(mask)
        total = allowed.double().sum(-1)
        kept.append((total if tile.sink is None else total + tile.sink[0, head - tile.heads.start]).float())
    row, key = listed.nonzero(as_tuple=True)
    columns = [mask[row, key] for mask in masks]
    return _TileEntries(listed.sum(-1), key, probability[row, key], torch.stack(columns), torch.stack(kept))


def _list_heaviest(listed: Tensor, weight: Tensor, count: int) -> None:
    """Mark the `count` heaviest keys of each row; a key of weight 0 is not marked."""
    value, key = weight.topk(min(count, weight.shape[1]), dim=1)
    listed.scatter_(1, key, listed.gather(1, key) | (value > 0))


def _joined(layer: int, head: int, rows: Sequence[_TileEntries], summarised: Tensor) -> HeavyKeys:
    first = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat([part.count for part in rows]).cpu().cumsum(0)])
    kept = torch.cat([part.kept for part in rows], 1).cpu()
    kept[summarised] = torch.nan
    key, probability = torch.cat([part.key for part in rows]).cpu(), torch.cat([part.probability for part in rows]).cpu()
    return HeavyKeys(layer, head, first, key, probability, torch.cat([part.allowed for part in rows], 1).cpu(), kept)
