"""The words that would have been lost: the links of full attention that a pattern drops and that carried most.

A few passages are read once more with full attention; in each layer and head the heaviest pairs outside of the pattern are
kept, and the heaviest of all are shown. A pair of the same two words in many heads is one loss told many times, so each
pair of tokens is listed once, where it weighed most, with the number of heads that lost it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farlight.hf.interface import Observation, use_pattern
from farlight.hf.layers import attention_layers
from farlight.patterns.base import Sizes
from farlight.understanding.passages import Passages
from farlight.understanding.subjects import Judged, Subject, pattern_for, subjects

__all__ = ["READ", "LostLink", "lost_links"]

# Passages that are read once more, and pairs kept of each layer and head.
READ = 4
_EACH_HEAD = 8
_LISTED_OF_A_HEAD = 2


@dataclass(frozen=True)
class LostLink:
    """Query position `query` of passage `passage` gave `share` of its attention, in this layer and head, to the key at `key`,
    which the pattern does not show it; `heads` counts in how many (layer, head) the pair is among the heaviest lost.
    """

    passage: int
    layer: int
    head: int
    query: int
    key: int
    share: float
    heads: int


def lost_links(
    model: Any,
    passages: Passages,
    patterns: Sequence[Judged | Subject],
    *,
    most: int = 24,
    read: int = READ,
    step: Callable[[str], None] = lambda what: None,
) -> list[list[LostLink]]:
    """For each pattern the heaviest lost links of `read` passages, taken evenly from those given; heaviest
    first, two of any one head at most."""
    count = min(read, passages.count)
    chosen = [p * passages.count // count for p in range(count)]
    judged = subjects(patterns)
    found: list[list[LostLink]] = [[] for _ in judged]
    numbers: dict[int, int] = {}
    for passage in chosen:
        layer = 0

        def observe(call: Observation, passage: int = passage) -> None:
            nonlocal layer
            shares = _shares(call)
            sizes = Sizes.of(call.q.shape[2], call.k.shape[2], heads=call.q.shape[1], q_offset=call.q_offset)
            for one, links in zip(judged, found, strict=True):
                pattern = pattern_for(one.at(numbers.get(id(call.module), layer)), call.q, call.k, call.key_real)
                if pattern is None:
                    continue
                mask = pattern.dense_rows(0, sizes.n_q, sizes, device=call.q.device)[0]
                links.extend(_heaviest(shares.masked_fill(mask, 0.0), passage, layer))
            layer += 1

        step("lost links")
        ids = passages.ids[passage : passage + 1].to(model.device)
        with use_pattern(model, None, observer=observe), torch.no_grad():
            numbers.update((id(module), number) for number, module in attention_layers(model).items())
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return [_spread(_once(links))[:most] for links in found]


def _shares(call: Observation) -> Tensor:
    """Full attention of one passage, `(H, n_q, n_k)` float32."""
    q, k = call.q[0].float(), call.k[0].float().repeat_interleave(call.q.shape[1] // call.k.shape[1], 0)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = q @ k.transpose(-1, -2) * scale
    sizes = Sizes.of(q.shape[1], k.shape[1], heads=q.shape[0], q_offset=call.q_offset)
    own = call.own.dense_rows(0, sizes.n_q, sizes, device=q.device)[0]
    return torch.nan_to_num(scores.masked_fill(~own, -torch.inf).softmax(-1))


def _heaviest(shares: Tensor, passage: int, layer: int) -> list[LostLink]:
    heads, rows, keys = shares.shape
    weight, place = shares.reshape(heads, -1).topk(min(_EACH_HEAD, rows * keys), dim=1)
    return [
        LostLink(passage, layer, head, at // keys, at % keys, share, 1)
        for head, (ws, ps) in enumerate(zip(weight.tolist(), place.tolist(), strict=True))
        for share, at in zip(ws, ps, strict=True)
        if share > 0
    ]


def _once(links: list[LostLink]) -> list[LostLink]:
    """Each pair of tokens once, where it weighed most."""
    best: dict[tuple[int, int, int], LostLink] = {}
    times: dict[tuple[int, int, int], int] = {}
    for link in links:
        pair = link.passage, link.query, link.key
        times[pair] = times.get(pair, 0) + 1
        if pair not in best or link.share > best[pair].share:
            best[pair] = link
    rows = (LostLink(**{**vars(link), "heads": times[pair]}) for pair, link in best.items())
    return sorted(rows, key=lambda link: -link.share)


def _spread(links: list[LostLink]) -> list[LostLink]:
    """At most a few links of any one head: a head that copies words would otherwise fill the list with its own losses."""
    seen: Counter[tuple[int, int]] = Counter()
    out = []
    for link in links:
        seen[link.layer, link.head] += 1
        if seen[link.layer, link.head] <= _LISTED_OF_A_HEAD:
            out.append(link)
    return out
