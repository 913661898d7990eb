"""Plans of router choices, made on the device: the work tables of a choice cost the host one small read.

A router's pattern changes at every call, so its plan is on the critical path. The tables of the kernels are made on the device
(`routed_lower_q`, `routed_lower_kv`); their lengths depend on the choice, and the host needs these to allocate and to launch.
All passes that a call will need are therefore counted first, and the counts read in one synchronisation. No other value is
copied between host and device.

A fixed pattern in union with the choice (`plan.routed_union`) has a host plan, lowered and uploaded once for all choices; its
work comes before that of the choice, which is planned without the pairs of the fixed part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from farlight.kernels.backend import Request
from farlight.kernels.triton.autotune import expected_config
from farlight.kernels.triton.configs import PASSES, Config
from farlight.kernels.triton.device_caps import num_processors
from farlight.kernels.triton.launches import KeyWork, QueryWork, table_overflow
from farlight.kernels.triton.lowering_cache import SHAPE, key_work, query_work
from farlight.kernels.triton.routed_lower_kv import RoutedKeyLowering
from farlight.kernels.triton.routed_lower_q import TILE, RoutedQueryLowering, RowGroupGrid
from farlight.patterns.expression import Pattern, Sizes
from farlight.plan import plan_for
from farlight.plan.cache import kept_with
from farlight.plan.chosen_links import ChosenLinks
from farlight.plan.footprint import Derived
from farlight.plan.routed_union import split_routed
from farlight.plan.tables import Plan

__all__ = ["RoutedPlan", "read_counts", "routed_plan"]

# Patterns whose tables are on the CPU are planned by the host. Tests of the interpreter set this.
allow_cpu = False


def read_counts(counts: Sequence[Tensor]) -> list[int]:
    """The values of 0-d tensors on a device, in one copy: the only synchronisation of planning."""
    return [int(n) for n in torch.stack(tuple(counts)).tolist()]


class _TableKey(NamedTuple):
    """What work tables depend on, besides the choice. `by_key`: those of the dk/dv pass."""

    by_key: bool
    block_m: int
    block_n: int
    heads_per_kv: int


@dataclass(eq=False)
class RoutedPlan:
    """The plan of a router's choice: its pieces, and the host plan of the `fixed` part of a union, if there is one.

    visited: pairs that the tiles cover, known once `checked`: the choice's indices have been read and found in range.
    derived: work tables by `_TableKey`; those of the `fixed` part count with its own plan.
    """

    sizes: Sizes
    pieces: list[ChosenLinks]
    fixed: Plan | None = None
    visited: int = 0
    checked: bool = False
    derived: Derived = field(default_factory=Derived)

    def __post_init__(self) -> None:
        if self.fixed is not None:
            self.derived.shared = (self.fixed, self.fixed.derived)

    @property
    def overlapping(self) -> bool:
        """Whether a row may be served by two launches."""
        return self.fixed is not None or len(self.pieces) > 1

    @property
    def device(self) -> torch.device:
        return self.pieces[0].lo.device

    def prepare(self, passes: Sequence[tuple[str, Config]], heads_per_kv: int) -> None:
        """Make the tables of these (pass, configuration) that are missing, with one read for all of them.

        Raises PatternError where an index of the choice is out of range, PlanError where a table would be too long.
        """
        keys = dict.fromkeys(_TableKey(name == "dkdv", config.rows, config.keys, heads_per_kv) for name, config in passes)
        missing = [key for key in keys if key not in self.derived]
        if not missing and self.checked:
            return
        with torch.inference_mode(False), torch.no_grad():
            lowerings = [self._lowering(key) for key in missing]
            # Host work while the device computes the counts.
            fixed_work = [self._fixed_work(key) for key in missing]
            checks = [] if self.checked else self._checks()
            values = read_counts([*checks, *(count for lowering in lowerings for count in lowering.counts)])
            if not self.checked:
                self._check(values)
            first = len(checks)
            # Tables are indexed in 32 bits.
            if any(value >= 2**30 for value in values[first:]):
                raise table_overflow()
            for key, lowering, earlier in zip(missing, lowerings, fixed_work, strict=True):
                last = first + len(lowering.counts)
                work = lowering.build(values[first:last])
                first = last
                if earlier is not None:  # of the same pass, and so of the same class
                    work = replace(work, earlier=earlier, covers=earlier.covers)  # type: ignore[arg-type]
                self.derived[key] = work

    def queries(self, config: Config, heads_per_kv: int) -> QueryWork:
        """The work of the forward and dq passes."""
        # Both passes read the same tables.
        self.prepare([("dq", config)], heads_per_kv)
        work = self.derived[_TableKey(False, config.rows, config.keys, heads_per_kv)]
        assert isinstance(work, QueryWork)
        return work

    def keys(self, config: Config, heads_per_kv: int) -> KeyWork:
        """The work of the dk/dv pass."""
        self.prepare([("dkdv", config)], heads_per_kv)
        work = self.derived[_TableKey(True, config.rows, config.keys, heads_per_kv)]
        assert isinstance(work, KeyWork)
        return work

    def _lowering(self, key: _TableKey) -> RoutedQueryLowering | RoutedKeyLowering:
        lowering = RoutedKeyLowering if key.by_key else RoutedQueryLowering
        processors, after = num_processors(self.device), self.fixed is not None
        return lowering(self.pieces, self.sizes, key.block_m, key.block_n, key.heads_per_kv, processors, after=after)

    def _fixed_work(self, key: _TableKey) -> QueryWork | KeyWork | None:
        if self.fixed is None:
            return None
        return (key_work if key.by_key else query_work)(self.fixed, *key[1:], self.device)

    def _checks(self) -> list[Tensor]:
        """Counts that are read once for each choice: visited pairs, and the range of its indices."""
        worst = self.pieces[0].index_range
        return [self._visited(), *(() if worst is None else (worst.smallest, worst.largest))]

    def _check(self, values: list[int]) -> None:
        """Keep the values of `_checks`, with which `values` begins. Raises PatternError where an index is out of range."""
        worst = self.pieces[0].index_range
        if worst is not None:
            worst.check(values[1], values[2])
        self.visited, self.checked = values[0] + (0 if self.fixed is None else self.fixed.visited), True

    def _visited(self) -> Tensor:
        """Pairs that tiles of rows cover, over batch and heads; 0-d int64."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for piece in self.pieces:
            grid = RowGroupGrid(piece, TILE, smaller=True)
            area = (grid.hi - grid.lo).clamp(min=0) * torch.where(grid.is_group, grid.count, 0)[:, :, None]
            copies = self.sizes.batch * self.sizes.heads // piece.variants
            total = total + area.sum() * copies
            if piece.points is not None:
                total = total + (piece.points >= 0).sum() * copies
        return total


def routed_plan(request: Request) -> RoutedPlan | None:
    """The plan of a pattern whose tables are on the request's device, with the work tables of the passes to come.

    None where the tables are elsewhere, or the pattern is not among those planned on a device (`plan.routed`,
    `plan.routed_union`). The plan cache keeps it for as long as the pattern lives.
    """
    pattern, sizes = request.pattern, request.sizes
    if not pattern._tables or (request.device.type == "cpu" and not allow_cpu):
        return None
    if any(table.device != request.device for table in pattern._tables):
        return None
    plan = kept_with(pattern, ("triton", sizes), lambda: _planned(pattern, sizes))
    if plan is not None:
        names = PASSES if request.needs_grad else PASSES[:1]
        widest = max(request.head_dim, request.value_dim)  # the launch pads the narrower
        configs = [(name, expected_config(name, widest, request.dtype, request.device)) for name in names]
        plan.prepare(configs, sizes.heads // request.kv_heads)
    return plan


def _planned(pattern: Pattern, sizes: Sizes) -> RoutedPlan | None:
    with torch.inference_mode(False), torch.no_grad():
        choice = split_routed(pattern, sizes)
    if choice is None:
        return None
    return RoutedPlan(sizes, choice.pieces, None if choice.fixed is None else plan_for(choice.fixed, sizes, SHAPE))
