"""A Hugging Face model whose sequence is spread over ranks: what each rank is given, and the attention of its layers.

A decoder is called with the rank's own tokens and their absolute `position_ids`, without an attention mask. Its layers' own
masks (causality, sliding windows) are functions of the distance of two positions, so they hold for the whole sequence as they
are written for a shard. Everything else about the whole sequence (padding, packed documents, global tokens) is said by
`pattern`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from farlight.distributed import Layout, attention
from farlight.errors import ArgumentError, UnsupportedError
from farlight.hf.keyword_arguments import merge_sinks
from farlight.patterns import causal, full, window
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router
from farlight.score import Score
from farlight.score.terms import NAMES, Alibi, Softcap

__all__ = ["Spread", "attend_spread", "sequence_collator"]


@dataclass(frozen=True)
class Spread:
    """The ranks over which a model's sequence is spread, and who owns which tokens (None: the local lengths, in rank order)."""

    mesh: Any
    layout: Layout | None = None


def attend_spread(
    module: nn.Module,
    spread: Spread,
    own: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Router | None,
    *,
    scale: float | None,
    dropout: float,
    backend: str,
    sinks: Tensor | None,
    score: Score | None = None,
) -> Tensor:
    """`(B, H, n_local, D_v)`: attention of the whole sequence under the layer's own mask and the model's pattern or router."""
    name = type(module).__name__
    unknown = [atom for atom in own.atoms() if not isinstance(atom, causal | full | window)]
    if unknown:
        raise UnsupportedError(
            f"{name} masks its shard by {unknown[0]!r}, which says nothing of the tokens of other ranks. Call the model "
            "without attention_mask, with the position_ids of contiguous tokens, and give padding or documents of the whole "
            "sequence in the pattern."
        )
    if q.shape[2] != k.shape[2]:
        raise UnsupportedError(
            f"{name} attends with {q.shape[2]} queries to {k.shape[2]} keys; a sequence over ranks is served without a cache "
            "(use_cache=False)."
        )
    terms = () if score is None else score.terms
    local = [NAMES[type(term)] for term in terms if not isinstance(term, Softcap | Alibi)]
    if local:
        raise UnsupportedError(
            f"{name} has {local[0]} made for its shard, which says nothing of the tokens of other ranks; softcap and alibi are "
            "served. Run it in one process, or call fl.distributed.attention with the score of the whole sequence."
        )
    joined: Any = own if pattern is None else pattern if own.text == full().text else pattern & own
    result = attention(
        q, k, v, joined, mesh=spread.mesh, layout=spread.layout, scale=scale, dropout=dropout, backend=backend, score=score,
        return_lse=True,
    )  # fmt: skip
    out, lse = result
    return out if sinks is None else merge_sinks(module, out, lse, sinks)


def sequence_collator(
    layout: Layout, rank: int, *, ignore_index: int = -100
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function from a batch of whole sequences to the arguments of a causal language model on this rank.

    The batch has `input_ids` `(B, n)` and perhaps `labels` `(B, n)` (else the tokens). Labels are shifted before they are cut,
    as the label of a shard's last token is on the next rank: `labels` and `shift_labels` are both the shifted ones, which
    transformers uses as they are. `num_items_in_batch` is the number of labels of the whole batch divided by the ranks, so that
    the mean over ranks of losses and gradients (DDP, FSDP) is that of the whole sequence. Raises ArgumentError for an attention
    mask that hides tokens.

    >>> import torch
    >>> collate = sequence_collator(Layout.even(6, 2), 1)
    >>> {name: x.tolist() for name, x in collate({"input_ids": torch.arange(6)[None]}).items()}["shift_labels"]
    [[4, 5, -100]]
    """

    def collate(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise ArgumentError(
                "the attention_mask hides tokens, which a shard of it cannot say to other ranks; pack the texts and pass "
                "fl.documents(lengths=…) or fl.padding(lengths) in the pattern."
            )
        labels = Layout.shift_labels(batch.get("labels", tokens), ignore_index=ignore_index)
        count = (labels != ignore_index).sum() / layout.world
        shifted = layout.shard(labels, 1, rank)
        positions = layout.position_ids(rank).to(tokens.device).expand(tokens.shape[0], -1)
        return {
            "input_ids": layout.shard(tokens, 1, rank),
            "position_ids": positions,
            "labels": shifted,
            "shift_labels": shifted,
            "num_items_in_batch": count,
        }

    return collate
