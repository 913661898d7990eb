"""Plans of patterns that a router made on the device: their tables are made there too, after one small read by the host.

A fixed pattern in union with the choice has a plan of the host's, whose lists are uploaded once for all choices; the kernels do
its work first and join the choice's links to it.

How long the tables are depends on the choice, and the host must know it to allocate and to launch. So everything that has a
length known beforehand is computed first, for all passes that the call will need, and ends in a few dozen sums; these are
read in one go. No other value comes to the host, none is copied from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from farlight.kernels.backend import Request
from farlight.kernels.triton.autotune import expected
from farlight.kernels.triton.configs import Config
from farlight.kernels.triton.device_caps import workers
from farlight.kernels.triton.lower_kv import KeyWork
from farlight.kernels.triton.lower_q import QueryWork, too_many
from farlight.kernels.triton.lowering_cache import SHAPE, key_work, query_work
from farlight.kernels.triton.routed_lower_kv import RoutedKeys
from farlight.kernels.triton.routed_lower_q import RoutedQueries, Tiles
from farlight.patterns.expression import Sizes
from farlight.plan import plan_for
from farlight.plan.chosen_links import ChosenLinks
from farlight.plan.routed_union import split_routed
from farlight.plan.tables import Plan

__all__ = ["RoutedPlan", "read", "routed_plan"]

# Plans of tensors on the CPU are made on the host: for the interpreter's tests this may be set.
on_the_cpu_too = False
# Plans that a pattern keeps, each for its sizes.
_MOST_KEPT = 4


def read(numbers: Sequence[Tensor]) -> list[int]:
    """The values of some numbers on a device: the one place where its planning waits for it."""
    return [int(n) for n in torch.stack(tuple(numbers)).tolist()]


@dataclass(eq=False)
class RoutedPlan:
    """What the kernels need of a plan: the choice in pieces, and the plan of the `fixed` part, if there is one.

    `overlapping`: a row may be served twice.
    """

    sizes: Sizes
    pieces: list[ChosenLinks]
    fixed: Plan | None = None
    visited: int = 0
    checked: bool = False
    derived: dict[object, object] = field(default_factory=dict)

    @property
    def overlapping(self) -> bool:
        return self.fixed is not None or len(self.pieces) > 1

    @property
    def device(self) -> torch.device:
        return self.pieces[0].lo.device

    def prepare(self, wanted: Sequence[tuple[str, Config]], group: int) -> None:
        """Make the tables for these passes and configurations that are not there yet, with one read for all of them."""
        keys = dict.fromkeys((what == "keys", config.rows, config.keys) for what, config in wanted)
        missing = [key for key in keys if (*key, group) not in self.derived]
        if not missing and self.checked:
            return
        many, after = workers(self.device), self.fixed is not None
        with torch.inference_mode(False), torch.no_grad():
            found = [
                (RoutedKeys if by_key else RoutedQueries)(self.pieces, self.sizes, rows, width, group, many, after=after)
                for by_key, rows, width in missing
            ]
            # Lowered while the device is at work on the sums.
            earlier = [None if self.fixed is None else self._earlier(self.fixed, *key, group) for key in missing]
            worst = self.pieces[0].index_range
            asked = [] if self.checked else [self._visited(), *(() if worst is None else (worst.smallest, worst.largest))]
            numbers = read([*asked, *(number for one in found for number in one.asked)])
            if not self.checked:
                if worst is not None:
                    worst.check(numbers[1], numbers[2])
                self.visited, self.checked = numbers[0] + (0 if self.fixed is None else self.fixed.visited), True
            at = len(asked)
            # Lists are numbered in 32 bits.
            if any(number >= 2**30 for number in numbers[at:]):
                raise too_many()
            for key, one, before in zip(missing, found, earlier, strict=True):
                work = one.made(numbers[at : at + len(one.asked)])
                at += len(one.asked)
                if before is not None:  # of the same pass, and so of the same kind
                    work = replace(work, earlier=before, covers=before.covers)  # type: ignore[arg-type]
                self.derived[(*key, group)] = work

    def queries(self, config: Config, group: int) -> QueryWork:
        self.prepare([("queries", config)], group)
        found = self.derived[False, config.rows, config.keys, group]
        assert isinstance(found, QueryWork)
        return found

    def keys(self, config: Config, group: int) -> KeyWork:
        self.prepare([("keys", config)], group)
        found = self.derived[True, config.rows, config.keys, group]
        assert isinstance(found, KeyWork)
        return found

    def _earlier(self, fixed: Plan, by_key: bool, rows: int, width: int, group: int) -> QueryWork | KeyWork:
        return (key_work if by_key else query_work)(fixed, rows, width, group, self.device)

    def _visited(self) -> Tensor:
        """Pairs that tiles of rows cover, over batch and heads."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for piece in self.pieces:
            tiles = Tiles(piece, 128, smaller=True)
            area = (tiles.hi - tiles.lo).clamp(min=0) * torch.where(tiles.head, tiles.count, 0)[:, :, None]
            times = self.sizes.batch * self.sizes.heads // piece.variants
            total = total + area.sum() * times
            if piece.points is not None:
                total = total + (piece.points >= 0).sum() * times
        return total


def routed_plan(request: Request) -> RoutedPlan | None:
    """The plan of a pattern that was made on the device of the request, its tables made for the passes to come.

    None where the pattern's tables are elsewhere, or where it is of no kind that is planned there. Kept with the pattern.
    """
    pattern, sizes = request.pattern, request.sizes
    if not pattern._tables or (request.device.type == "cpu" and not on_the_cpu_too):
        return None
    if any(table.device != request.device for table in pattern._tables):
        return None
    kept: dict[Sizes, RoutedPlan | None] = pattern.__dict__.setdefault("_routed", {})
    if sizes not in kept:
        while len(kept) >= _MOST_KEPT:
            del kept[next(iter(kept))]
        with torch.inference_mode(False), torch.no_grad():
            found = split_routed(pattern, sizes)
        fixed = None if found is None or found.fixed is None else plan_for(found.fixed, sizes, SHAPE)
        kept[sizes] = None if found is None else RoutedPlan(sizes, found.pieces, fixed)
    plan = kept[sizes]
    if plan is not None:
        passes = ("forward", "queries", "keys") if request.needs_grad else ("forward",)
        wanted = [(what, expected(what, request.head_dim, request.dtype, request.device)) for what in passes]
        plan.prepare(wanted, sizes.heads // request.kv_heads)
    return plan
