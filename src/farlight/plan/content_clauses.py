"""What the native planner reads of a router's pattern: a union of clauses, each a list table, a band, or named tokens.

A router's pattern differs in each call, so its plan is on the critical path. The union is read as it is written, without the
normal form of `farlight.plan.normal_form`: the planner unites the clauses tile by tile. Supported clauses: listed key blocks or
keys, windows without dilation, named tokens given as positions; each perhaps causal, restricted to real keys, or of one head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from farlight.patterns.algebra import HeadsOf, Intersection, PerHead, Union
from farlight.patterns.arguments import query_base
from farlight.patterns.expression import Atom, Pattern, Sizes
from farlight.patterns.named import global_tokens, seen_by_all, sees_all
from farlight.patterns.packing import padding
from farlight.patterns.positional import causal, full, window
from farlight.patterns.tables import check_lists, chosen_blocks, chosen_keys
from farlight.plan.clauses import Clause, clauses_of

__all__ = ["ClauseKind", "ContentClause", "content_clauses", "listed_clauses"]


class ClauseKind(IntEnum):
    """enum ClauseKind in csrc/content/plan_content.h."""

    BLOCKS = 0
    BAND = 1
    KEYS = 2
    ROWS = 3


@dataclass(frozen=True)
class ContentClause:
    """One clause, perhaps `causal`, perhaps restricted to `real_keys` `(B|1, n_k)` uint8, of one `head` or of all (None).

    BLOCKS: `table` `(B|1, H|1, lists, width)` int16, int32 or int64 of key blocks of `block` keys, -1 = none; list u serves
    the positions base + u · query_block … base + (u + 1) · query_block - 1. BAND: keys i - left … i + right. KEYS, ROWS:
    `table` `(1, 1, ranges, 2)` int64 of keys that every query sees, or of query positions that see every key.
    """

    kind: ClauseKind
    causal: bool = False
    table: Tensor | None = None
    block: int = 1
    query_block: int = 1
    base: int = 0
    left: int = 0
    right: int = 0
    real_keys: Tensor | None = None
    head: int | None = None


def listed_clauses(pattern: Pattern, sizes: Sizes) -> list[ContentClause] | None:
    """`content_clauses` of a pattern with lists of blocks or keys; None for any other pattern."""
    clauses = clauses_of(pattern) if pattern._tables else []
    has_lists = any(isinstance(atom, chosen_blocks | chosen_keys) for clause in clauses for atom in clause)
    return _read_all(clauses, pattern, sizes) if has_lists else None


def content_clauses(pattern: Pattern, sizes: Sizes) -> list[ContentClause] | None:
    """The clauses of a pattern, whose tables are in memory of the host; None where one is not supported.

    Raises PatternError where a table does not fit the sizes; its indices are not read here.
    """
    return _read_all(clauses_of(pattern), pattern, sizes)


def _read_all(clauses: list[Clause], pattern: Pattern, sizes: Sizes) -> list[ContentClause] | None:
    if any(table.device.type != "cpu" for table in pattern._tables) or not sizes.n_q or not sizes.n_k:
        return None
    _check_heads(pattern, sizes)
    supported: list[ContentClause] = []
    for clause in clauses:
        of_heads = [set(atom.heads) for atom in clause if isinstance(atom, HeadsOf)]
        for half in _halves(tuple(atom for atom in clause if not isinstance(atom, HeadsOf))):
            read = _read(half, sizes)
            if read is None:
                return None
            supported += [replace(read, head=head) for head in set.intersection(*of_heads)] if of_heads else [read]
    return supported or None


def _check_heads(pattern: Pattern, sizes: Sizes) -> None:
    """Raise where a `per_head` has another number of parts than there are heads."""
    if isinstance(pattern, PerHead) and len(pattern.parts) != sizes.heads:
        pattern.check(sizes)
    for part in pattern.parts if isinstance(pattern, Union | Intersection | PerHead) else ():
        _check_heads(part, sizes)


def _halves(clause: Clause) -> list[Clause]:
    """The clause with `global_tokens` written as its rows and its keys."""
    for at, atom in enumerate(clause):
        if isinstance(atom, global_tokens) and not atom._tables:
            return [(*clause[:at], half(atom.positions or ()), *clause[at + 1 :]) for half in (sees_all, seen_by_all)]
    return [clause]


def _read(clause: Clause, sizes: Sizes) -> ContentClause | None:
    masks = [atom for atom in clause if isinstance(atom, padding)]
    atoms = [atom for atom in clause if not isinstance(atom, causal | padding)]
    if len(atoms) > 1:
        return None
    for atom in clause:
        if not isinstance(atom, chosen_blocks | chosen_keys):
            atom.check(sizes)
    is_causal = any(isinstance(atom, causal) for atom in clause)
    return _read_atom(atoms[0] if atoms else full(), sizes, is_causal, _real_keys(masks, sizes) if masks else None)


def _read_atom(atom: Atom, sizes: Sizes, is_causal: bool, real: Tensor | None) -> ContentClause | None:
    if isinstance(atom, chosen_blocks | chosen_keys):
        block, query_block = (atom.block, atom.query_block) if isinstance(atom, chosen_blocks) else (1, 1)
        check_lists(atom._query_argument, atom._tables[0], sizes, query_block)
        table = atom._tables[0].contiguous()
        base = query_base(atom._query_argument, table.shape[2], sizes, query_block)
        return ContentClause(ClauseKind.BLOCKS, is_causal, table, block, query_block, base, real_keys=real)
    limit = sizes.n_q + sizes.n_k + abs(sizes.q_offset)  # no window reaches further
    if isinstance(atom, full):
        return ContentClause(ClauseKind.BAND, is_causal, left=limit, right=limit, real_keys=real)
    if isinstance(atom, window) and atom.dilation == 1:
        left, right = min(atom.left, limit), min(atom.right, limit)
        return ContentClause(ClauseKind.BAND, is_causal, left=left, right=right, real_keys=real)
    if isinstance(atom, seen_by_all | sees_all) and not atom._tables:
        ranges = atom._edges(sizes, torch.device("cpu")).view(1, 1, -1, 2).contiguous()
        kind = ClauseKind.KEYS if isinstance(atom, seen_by_all) else ClauseKind.ROWS
        return ContentClause(kind, is_causal, ranges, real_keys=real)
    return None


def _real_keys(masks: list[padding], sizes: Sizes) -> Tensor:
    """`(B or 1, n_k)` uint8: keys that are real under every padding."""
    real = torch.ones(1, sizes.n_k, dtype=torch.bool, device="cpu")
    for mask in masks:
        if mask.lengths is None:
            real = real & mask._tables[0]
        else:
            real = real & (torch.arange(sizes.n_k, device="cpu") < torch.tensor(mask.lengths, device="cpu")[:, None])
    return real.to(torch.uint8).contiguous()
