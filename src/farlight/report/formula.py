"""A pattern as a tree of rules that the page evaluates exactly: a few hundred bytes for most patterns.

A rule is `{"is": name, …}` with numbers and, where a pattern is data (clusters, masks, chosen keys), packed tables; no code.
Positions are resolved for n tokens, one batch item and one head. An atom without a rule here is exported as the key
intervals of its rows, in CSR form ("stretches").

The evaluator is `assets/js/04-pattern.js`; tests compare the two pair by pair.
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
_MAX_INTERVALS = 1 << 20


def formula(pattern: Pattern, n: int, *, batch: int = 0, head: int = 0) -> Rule:
    """The rule of the pattern over n tokens for one batch item and head, as plain values for JSON.

    Raises PatternError or ArgumentError when the pattern does not fit n, UnsupportedError for an atom without a rule whose
    rows have more than `_MAX_INTERVALS` intervals.

    >>> import farlight as fl
    >>> formula(fl.window(2) | fl.global_tokens([0, -1]), 10)["parts"]
    [{'is': 'window', 'left': 2, 'right': 2, 'step': 1}, {'is': 'global_tokens', 'runs': [0, 1, 9, 10]}]
    """
    return _RuleWriter(sizes_of(pattern, n, batch, head), batch, head).rule(pattern)


class _RuleWriter:
    """Rules of the parts of one pattern; `every`: all positions, (n,) int64."""

    def __init__(self, sizes: Sizes, batch: int, head: int) -> None:
        self.sizes, self.n, self.head = sizes, sizes.n_k, head
        self.b, self.h = torch.tensor(batch, device="cpu"), torch.tensor(head, device="cpu")
        self.every = torch.arange(self.n, device="cpu")

    def rule(self, pattern: Pattern) -> Rule:
        """The rule of an atom or combination."""
        match pattern:
            case Union():
                return self._combination("or", pattern.parts)
            case Intersection():
                return self._combination("and", pattern.parts)
            case Difference():
                return self._combination("sub", pattern.parts)
            case Complement():
                return {**self._combination("not", pattern.parts), "text": repr(pattern)}
            case PerHead():
                return self.rule(pattern.parts[self.head])
            case Atom():
                return {"is": type(pattern).__name__, **self.atom(pattern)}
        raise UnsupportedError(
            f"{show(pattern)}: {type(pattern).__name__} is neither a primitive nor a combination known here."
        )

    def _combination(self, operator: str, parts: tuple[Pattern, ...]) -> Rule:
        return {"is": operator, "parts": [self.rule(part) for part in parts]}

    def atom(self, atom: Atom) -> Rule:
        """The fields of an atom's rule; "is" only where it differs from the class name."""
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
                return {**self._random(atom), "causal": atom.causal}
            case random_blocks():
                return {**self._random(atom), "causal": atom.causal, "block": atom.block}
            case sees_all() | seen_by_all() | global_tokens():
                return {"runs": pack(_runs(atom._is_named(self.sizes, self.b, self.every)))}
            case padding():
                return {
                    "runs": pack(_runs(atom._allows(self.sizes, self.b, self.h, torch.tensor(0, device="cpu"), self.every)))
                }
            case documents():
                return {"labels": self._dense_labels(atom._id_at(self.sizes, self.b, self.every, -1))}
            case clusters():
                query = atom._query_label(self.sizes, self.b, self.h, self.every)
                key = [atom._key_label(self.b, self.h, self.every)] if len(atom._tables) > 1 else []
                return {"labels": self._dense_labels(query, *key)}
            case pairs() | blocks():
                return self._layout(atom)
            case chosen_keys() | chosen_blocks():
                return self._chosen(atom)
        return self._interval_table(atom)

    def _random(self, atom: random_keys | random_blocks) -> Rule:
        """Count, seed as two 32-bit words, and head."""
        low, high = atom.seed & 0xFFFFFFFF, atom.seed >> 32
        return {"count": atom.number, "seed": [low, high], "head": self.head}

    def _dense_labels(self, *labels: Tensor) -> list[Any]:
        """Label tables renumbered 0, 1, …: only equality matters, and ids beyond int32 would not fit the packed arrays."""
        tables = [table.expand(self.n).numpy() for table in labels]
        distinct = np.unique(np.concatenate(tables))
        distinct = distinct[distinct >= 0]
        return [pack(np.where(table < 0, -1, np.searchsorted(distinct, table))) for table in tables]

    def _layout(self, atom: pairs | blocks) -> Rule:
        """The mask as bits, little-endian, rows padded to bytes."""
        block = atom.block if isinstance(atom, blocks) else 1
        mask = self._slice(atom._tables[0])
        bits = np.packbits(mask.numpy(), axis=1, bitorder="little")
        return {"block": block, "rows": mask.shape[0], "bytes": bits.shape[1], "bits": pack(bits, "u1")}

    def _chosen(self, atom: chosen_keys | chosen_blocks) -> Rule:
        """The index table, `each` entries per query block."""
        block, query_block = (1, 1) if isinstance(atom, chosen_keys) else (atom.block, atom.query_block)
        table = self._slice(atom._tables[0])
        return {"block": block, "query_block": query_block, "each": table.shape[1], "table": pack(table.long().numpy())}

    def _slice(self, table: Tensor) -> Tensor:
        """The batch item and head of a `(B|1, H|1, …)` table."""
        b, h = leading(table, self.b, self.h)
        return table[int(b), int(h)].cpu()

    def _interval_table(self, atom: Atom) -> Rule:
        """The key intervals of all rows in CSR form, for an atom without a rule here."""
        zeros = torch.zeros_like(self.every)
        row, lo, hi = atom._spans(self.sizes, zeros + self.b, zeros + self.h, self.every).listed()
        if row.numel() > _MAX_INTERVALS:
            raise UnsupportedError(
                f"{show(atom)} has no rule for a page, and its rows see {row.numel():,} intervals of keys over {self.n:,} "
                f"tokens, more than the {_MAX_INTERVALS:,} that a page may hold; use fewer tokens."
            )
        first = np.searchsorted(row.numpy(), np.arange(self.n + 1))
        return {
            "is": "stretches",
            "name": type(atom).__name__,
            "first": pack(first),
            "lo": pack(lo.numpy()),
            "hi": pack(hi.numpy()),
        }


def _runs(member: Tensor) -> Any:
    """`lo, hi, lo, hi, …` of the runs of True in an (n,) bool tensor."""
    edge = np.diff(np.concatenate(([0], member.expand(member.shape).numpy().astype(np.int8), [0])))
    return np.flatnonzero(edge)
