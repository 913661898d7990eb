"""A pattern as a small tree of rules that a browser can evaluate: exact, and a few hundred bytes for most patterns.

A rule carries numbers and, where a pattern is data (clusters, masks, chosen keys), packed tables; never code. Positions are
resolved for n tokens and one batch item and head, so that the reader needs no conventions. An atom that has no rule here
is written out as the stretches of keys that its rows see: every pattern can be exported.

The other side is `assets/pattern.js`; the tests hold the two against each other pair by pair.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from farlight.analysis.graph.sizes import sizes_of
from farlight.errors import UnsupportedError, show
from farlight.patterns.algebra import Complement, Difference, Intersection, PerHead, Union
from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.named import global_tokens, seen_by_all, sees_all
from farlight.patterns.packing import documents, padding
from farlight.patterns.positional import blocked_window, causal, full, landmarks, offsets, strided, window
from farlight.patterns.random import random_blocks, random_keys
from farlight.patterns.tables import blocks, chosen_blocks, chosen_keys, clusters, leading, pairs
from farlight.report.packing import pack

__all__ = ["formula"]

Rule = dict[str, Any]
_MOST_STRETCHES = 1 << 20


def formula(pattern: Pattern, n: int, *, batch: int = 0, head: int = 0) -> Rule:
    """The pattern over n tokens, for one batch item and head, as a tree of plain values for JSON.

    Raises PatternError or ArgumentError when the pattern does not fit, UnsupportedError for an atom unknown here whose rows
    see too many stretches to write them out.

    >>> import farlight as fl
    >>> formula(fl.window(2) | fl.global_tokens([0, -1]), 10)["parts"]
    [{'is': 'window', 'left': 2, 'right': 2, 'step': 1}, {'is': 'global_tokens', 'runs': [0, 1, 9, 10]}]
    """
    return _Writer(sizes_of(pattern, n, batch, head), batch, head).rule(pattern)


class _Writer:
    def __init__(self, sizes: Sizes, batch: int, head: int) -> None:
        self.sizes, self.n, self.head = sizes, sizes.n_k, head
        self.b, self.h = torch.tensor(batch, device="cpu"), torch.tensor(head, device="cpu")
        self.every = torch.arange(self.n, device="cpu")

    def rule(self, pattern: Pattern) -> Rule:
        match pattern:
            case Union():
                return self._of("or", pattern.parts)
            case Intersection():
                return self._of("and", pattern.parts)
            case Difference():
                return self._of("sub", pattern.parts)
            case Complement():
                return {**self._of("not", pattern.parts), "text": repr(pattern)}
            case PerHead():
                return self.rule(pattern.parts[self.head])
            case Atom():
                return {"is": type(pattern).__name__, **self.atom(pattern)}
        raise UnsupportedError(
            f"{show(pattern)}: {type(pattern).__name__} is neither a primitive nor a combination known here."
        )

    def _of(self, how: str, parts: tuple[Pattern, ...]) -> Rule:
        return {"is": how, "parts": [self.rule(part) for part in parts]}

    def atom(self, atom: Atom) -> Rule:
        match atom:
            case full() | causal():
                return {}
            case window():
                return {"left": atom.left, "right": atom.right, "step": atom.dilation}
            case strided():
                phase = None if atom.phase is None else int(torch.as_tensor(atom._phase(self.h), device="cpu"))
                return {"stride": atom.stride, "phase": phase}
            case blocked_window():
                return {"left": atom.left, "right": atom.right, "block": atom.block}
            case landmarks():
                return {"every": atom.every, "count": atom.last}
            case offsets():
                return {"values": pack([v for v in atom.values if abs(v) < self.n])}
            case random_keys():
                return {**self._drawn(atom), "causal": atom.causal}
            case random_blocks():
                return {**self._drawn(atom), "causal": atom.causal, "block": atom.block}
            case sees_all() | seen_by_all() | global_tokens():
                return {"runs": pack(_runs(atom._is_named(self.sizes, self.b, self.every)))}
            case padding():
                return {
                    "runs": pack(_runs(atom._allows(self.sizes, self.b, self.h, torch.tensor(0, device="cpu"), self.every)))
                }
            case documents():
                return {"labels": self._ids(atom._id_at(self.sizes, self.b, self.every, -1))}
            case clusters():
                query = atom._query_label(self.sizes, self.b, self.h, self.every)
                own = [atom._key_label(self.b, self.h, self.every)] if len(atom._tables) > 1 else []
                return {"labels": self._ids(query, *own)}
            case pairs() | blocks():
                return self._layout(atom)
            case chosen_keys() | chosen_blocks():
                return self._chosen(atom)
        return self._spelled_out(atom)

    def _drawn(self, atom: random_keys | random_blocks) -> Rule:
        low, high = atom.seed & 0xFFFFFFFF, atom.seed >> 32
        return {"count": atom.number, "seed": [low, high], "head": self.head}

    def _ids(self, *labels: Tensor) -> list[Any]:
        """Tables of labels, numbered anew from 0: only equality counts, and large ids would not fit the page's integers."""
        tables = [table.expand(self.n).numpy() for table in labels]
        names = np.unique(np.concatenate(tables))
        names = names[names >= 0]
        return [pack(np.where(table < 0, -1, np.searchsorted(names, table))) for table in tables]

    def _layout(self, atom: pairs | blocks) -> Rule:
        block = atom.block if isinstance(atom, blocks) else 1
        mask = self._mine(atom._tables[0])
        bits = np.packbits(mask.numpy(), axis=1, bitorder="little")
        return {"block": block, "rows": mask.shape[0], "bytes": bits.shape[1], "bits": pack(bits, "u1")}

    def _chosen(self, atom: chosen_keys | chosen_blocks) -> Rule:
        block, query_block = (1, 1) if isinstance(atom, chosen_keys) else (atom.block, atom.query_block)
        table = self._mine(atom._tables[0])
        return {"block": block, "query_block": query_block, "each": table.shape[1], "table": pack(table.numpy())}

    def _mine(self, table: Tensor) -> Tensor:
        """This batch item's and head's part of a `(B, H, …)` table."""
        b, h = leading(table, self.b, self.h)
        return table[int(b), int(h)].cpu()

    def _spelled_out(self, atom: Atom) -> Rule:
        """The stretches of every row, for an atom that only says what it allows."""
        same = torch.zeros_like(self.every)
        row, lo, hi = atom._spans(self.sizes, same + self.b, same + self.h, self.every).listed()
        if row.numel() > _MOST_STRETCHES:
            raise UnsupportedError(
                f"{show(atom)} has no rule for a page, and its rows see {row.numel():,} stretches of keys over {self.n:,} "
                f"tokens, more than the {_MOST_STRETCHES:,} that a page may hold; ask about fewer tokens."
            )
        first = np.searchsorted(row.numpy(), np.arange(self.n + 1))
        return {"is": "stretches", "first": pack(first), "lo": pack(lo.numpy()), "hi": pack(hi.numpy())}


def _runs(member: Tensor) -> Any:
    """`lo, hi, lo, hi, …` of the runs of True."""
    edge = np.diff(np.concatenate(([0], member.expand(member.shape).numpy().astype(np.int8), [0])))
    return np.flatnonzero(edge)
