"""`Layout`: which positions of a sequence each rank owns, and the shards, position ids and labels that follow from it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farlight.errors import ArgumentError, show
from farlight.patterns.expression import Pattern

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from farlight.distributed.communication import Communication

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """The positions that each rank of a group owns: piece p holds the positions `cuts[p] … cuts[p + 1] - 1`.

    A value: hashable, picklable, shared by all layers and ranks. Pieces may be empty and of any length.

    Args:
        cuts: ascending whole numbers from 0 to n.
        owners: the rank of each piece; None: piece p belongs to rank p. A rank may own several pieces. Its local order is that
            of positions.
        world: number of ranks; None: one more than the largest owner.

    Raises ArgumentError where these do not describe a partition of 0 … n - 1.

    >>> layout = Layout([0, 4, 4, 10])
    >>> layout.n, layout.world, layout.lengths, layout.position_ids(2).tolist()
    (10, 3, (4, 0, 6), [4, 5, 6, 7, 8, 9])
    """

    cuts: tuple[int, ...]
    owners: tuple[int, ...] = ()
    world: int = 0
    lengths: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())

    def __init__(self, cuts: Sequence[int], owners: Sequence[int] | None = None, world: int | None = None) -> None:
        edges = tuple(_whole(cut, "a cut") for cut in cuts)
        if len(edges) < 2 or edges[0] != 0 or any(a > b for a, b in itertools.pairwise(edges)):
            raise ArgumentError(f"Layout: the cuts {show(list(cuts))} must ascend from 0 to the number of tokens.")
        pieces = len(edges) - 1
        ranks = tuple(range(pieces)) if owners is None else tuple(_whole(rank, "an owner") for rank in owners)
        if len(ranks) != pieces:
            raise ArgumentError(f"Layout: {len(ranks)} owners for the {pieces} pieces between the cuts; give one for each.")
        count = max(ranks) + 1 if world is None else _whole(world, "world")
        if count <= max(ranks):
            raise ArgumentError(f"Layout: rank {max(ranks)} owns a piece, but there are {count} ranks.")
        lengths = [0] * count
        for rank, lo, hi in zip(ranks, edges, edges[1:], strict=False):
            lengths[rank] += hi - lo
        for name, value in (("cuts", edges), ("owners", ranks), ("world", count), ("lengths", tuple(lengths))):
            object.__setattr__(self, name, value)

    # ---- constructors ------------------------------------------------------------------------------------------------
    @staticmethod
    def even(n: int, world: int, *, multiple: int = 1) -> Layout:
        """n tokens in `world` runs whose lengths differ by at most one; or by at most `multiple`, with cuts at its multiples,
        so that no block of a block pattern or router is cut.

        >>> Layout.even(10, 4).lengths
        (2, 3, 2, 3)
        """
        n, world, unit = _whole(n, "n"), _whole(world, "world", 1), _whole(multiple, "multiple", 1)
        blocks = -(-n // unit)
        return Layout([min(n, blocks * rank // world * unit) for rank in range(world + 1)])

    @staticmethod
    def balanced(pattern: Pattern, n: int, world: int, *, batch: int = 1, heads: int = 1, move: str = "cheapest") -> Layout:
        """Runs of n tokens whose allowed pairs, summed over batch and heads, are as equal as contiguous cuts make them.

        Cut points move; tokens are not shuffled, which would multiply the borders across which windows need keys. Only plain
        causal attention, where every rank needs all earlier keys anyway, gets two pieces a rank: one from the head and its
        mirror image from the tail, which balances tokens, and with `move="keys"` the pairs too.

        move: as for `fl.distributed.attention`. With "cheapest" a row with more than n / world keys counts where its keys are,
        since its query travels there.

        >>> import farlight as fl
        >>> Layout.balanced(fl.window(8) & fl.causal() | fl.seen_by_all([0]), 1000, 4).lengths
        (254, 249, 249, 248)
        >>> Layout.balanced(fl.causal(), 16, 2).owners
        (0, 1, 1, 0)
        """
        from farlight.distributed.links import pair_costs

        n, world = _whole(n, "n"), _whole(world, "world", 1)
        if pattern.text == "causal()" and n >= 2 * world:
            return Layout([n * p // (2 * world) for p in range(2 * world + 1)], [*range(world), *reversed(range(world))])
        longest = n / world if move == "cheapest" else float(n)
        total = np.concatenate(([0], np.cumsum(pair_costs(pattern, n, longest, batch=batch, heads=heads), dtype=np.float64)))
        if total[-1] == 0:
            return Layout.even(n, world)
        cuts = np.searchsorted(total, total[-1] * np.arange(1, world) / world)
        return Layout([0, *cuts.tolist(), n])

    # ---- reading -----------------------------------------------------------------------------------------------------
    @property
    def n(self) -> int:
        """The number of tokens."""
        return self.cuts[-1]

    def pieces(self, rank: int) -> list[tuple[int, int]]:
        """The (first, last + 1) positions of each nonempty piece of a rank, ascending."""
        self._check_rank(rank)
        runs = zip(self.owners, self.cuts, self.cuts[1:], strict=False)
        return [(lo, hi) for owner, lo, hi in runs if owner == rank and lo < hi]

    def owner_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rank that owns each position."""
        piece = np.searchsorted(np.array(self.cuts), positions, side="right") - 1
        return np.array(self.owners, dtype=np.int64)[piece]

    def local_index(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each position within the shard of its owner."""
        first = np.zeros(len(self.owners), dtype=np.int64)
        filled = [0] * self.world
        for piece, (owner, lo, hi) in enumerate(zip(self.owners, self.cuts, self.cuts[1:], strict=False)):
            first[piece] = filled[owner]
            filled[owner] += hi - lo
        cuts = np.array(self.cuts, dtype=np.int64)
        piece_of = np.searchsorted(cuts, positions, side="right") - 1
        return first[piece_of] + positions - cuts[piece_of]

    def position_ids(self, rank: int) -> Tensor:
        """The absolute positions of a rank's tokens, `(n_local,)` int64: what rotary and learned embeddings need."""
        runs = [torch.arange(lo, hi) for lo, hi in self.pieces(rank)]
        return torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64)

    # ---- moving tensors ----------------------------------------------------------------------------------------------
    def shard(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """The rank's tokens of a tensor that holds all n along `dim`; differentiable. A single piece is a view.

        Labels of a language model are to be shifted first (`shift_labels`): the label of a shard's last token is on the next
        rank.

        >>> Layout([0, 2, 5]).shard(torch.arange(5), 0, 1).tolist()
        [2, 3, 4]
        """
        if x.shape[dim] != self.n:
            raise ArgumentError(f"shard: dimension {dim} of {tuple(x.shape)} is not the layout's {self.n} tokens.")
        runs = [x.narrow(dim, lo, hi - lo) for lo, hi in self.pieces(rank)]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim) if runs else x.narrow(dim, 0, 0)

    def unshard(self, x: Tensor, dim: int, group: ProcessGroup | None = None) -> Tensor:
        """All n tokens along `dim` on every rank, from each rank's shard: an all-gather. Not differentiable.

        Raises ArgumentError for a shard of another length, or one through which a gradient would have to flow.
        """
        from farlight.distributed.collectives import Channel

        if x.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(
                "unshard: no gradient flows through the gathered tensor; pass x.detach(), or use torch.no_grad()."
            )
        channel = Channel(group)
        if channel.world != self.world or x.shape[dim] != self.lengths[channel.rank]:
            raise ArgumentError(
                f"unshard: {x.shape[dim]} tokens on rank {channel.rank} of {channel.world}, but the layout gives it "
                f"{self.lengths[channel.rank] if channel.rank < self.world else 0} of {self.world} ranks."
            )
        shards = channel.gather_uneven(x.movedim(dim, 0).contiguous(), self.lengths)
        out = torch.empty((self.n, *shards[0].shape[1:]), dtype=x.dtype, device=x.device)
        for rank, part in enumerate(shards):
            first = 0
            for lo, hi in self.pieces(rank):
                out[lo:hi] = part[first : first + hi - lo]
                first += hi - lo
        return out.movedim(0, dim)

    @staticmethod
    def shift_labels(tokens: Tensor, *, ignore_index: int = -100) -> Tensor:
        """The next token of each, along the last dimension; `ignore_index` for the last. To be called before `shard`.

        >>> Layout.shift_labels(torch.tensor([[5, 6, 7]])).tolist()
        [[6, 7, -100]]
        """
        last = torch.full_like(tokens[..., :1], ignore_index)
        return torch.cat((tokens[..., 1:], last), -1)

    def communication(self, pattern: Pattern, *, heads: int, head_dim: int, **options: object) -> Communication:
        """Pairs and bytes per rank of one attention under `pattern`: `farlight.distributed.communication`, for this layout."""
        from farlight.distributed.communication import communication

        return communication(self, pattern, heads=heads, head_dim=head_dim, **options)  # type: ignore[arg-type]

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world:
            raise ArgumentError(f"rank {rank} is not one of the layout's {self.world}; use 0 … {self.world - 1}.")


def _whole(value: object, what: str, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ArgumentError(f"Layout: {what} is {show(value)}; it must be a whole number of at least {least}.")
    return int(value)
