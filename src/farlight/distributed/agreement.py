"""Do all ranks mean the same attention? One small gather of checksums before the first exchange, so that no rank computes on,
or waits for, what another does not send.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farlight._version import __version__
from farlight.distributed.collectives import Channel
from farlight.distributed.layout import Layout
from farlight.errors import ArgumentError, FarlightError

__all__ = ["agree", "agree_on_seed", "layout_of_lengths"]


def _checksum(value: object) -> int:
    """63 bits of a hash of `repr(value)`."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big") >> 1


def agree(channel: Channel, fields: Mapping[str, object], trouble: FarlightError | None, device: torch.device) -> None:
    """Compare the fields, and the version, of all ranks, and learn whether any has an error of its own. Collective.

    Raises on every rank: `trouble` where there is one, else ArgumentError that names the ranks that differ from most, and in
    what.
    """
    named = {**fields, "version of farlight": __version__}
    values = [int(trouble is not None), *(_checksum(value) for value in named.values())]
    table = channel.numbers("checksums", values, device)
    if trouble is not None:
        raise trouble
    failing = np.flatnonzero(table[:, 0]).tolist()
    if failing:
        raise ArgumentError(f"{_ranks(failing)} of {channel.world} cannot take part; the error there says why.")
    for column, (name, value) in enumerate(named.items(), 1):
        odd = _odd_ranks(table[:, column].tolist())
        if odd:
            raise ArgumentError(
                f"the ranks ask for different attentions: {_ranks(odd)} of {channel.world} differ from the others in the "
                f"{name} (here, on rank {channel.rank}: {str(value)[:200]}); pass the same on all ranks."
            )


def agree_on_seed(channel: Channel, seed: Tensor, was_given: bool, device: torch.device) -> Tensor:
    """The seed of dropout: the given one, which must be equal on all ranks, or that which rank 0 drew. Collective."""
    table = channel.numbers("seeds", (int(seed), int(was_given)), device)
    if bool(table[:, 1].any()) and len({tuple(row) for row in table.tolist()}) > 1:
        odd = _odd_ranks([tuple(row) for row in table.tolist()])
        raise ArgumentError(
            f"dropout: {_ranks(odd)} of {channel.world} pass another seed than the others; pass one seed on all ranks, or None."
        )
    return torch.tensor(int(table[0, 0]), dtype=torch.int64, device="cpu")


def layout_of_lengths(channel: Channel, n_q: int, n_k: int, device: torch.device) -> tuple[Layout, Layout]:
    """Contiguous layouts of the keys and of the queries, in rank order, from the local lengths of all ranks. Collective."""
    table: NDArray[np.int64] = channel.numbers("lengths", (n_q, n_k), device)
    ends = np.cumsum(table, axis=0)
    return Layout([0, *ends[:, 1].tolist()]), Layout([0, *ends[:, 0].tolist()])


def _odd_ranks(values: list[object]) -> list[int]:
    """The ranks whose value is not that of most; in a tie the lowest rank has the common one."""
    counts = Counter(values)
    common = max(counts, key=lambda value: (counts[value], -values.index(value)))
    return [rank for rank, value in enumerate(values) if value != common]


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
