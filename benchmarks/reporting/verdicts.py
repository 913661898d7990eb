"""Where farlight wins and where it loses: every comparison that was measured, as a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from reporting.wording import DTYPES, Row, code, distinct, kind, measured, rows_of, seconds, share, times

__all__ = ["Comparison", "comparisons", "losses", "missing", "wins"]


@dataclass(frozen=True)
class Comparison:
    """farlight against another, on one task: `ratio` times as fast."""

    task: str
    ours: str
    our_seconds: float
    theirs: str
    their_seconds: float
    predicted: bool = False

    @property
    def ratio(self) -> float:
        return self.their_seconds / self.our_seconds

    def sentence(self) -> str:
        other = f"{self.theirs} {'≈ ' if self.predicted else ''}{seconds(self.their_seconds)}"
        if self.predicted:
            other += " (predicted)"
        return f"{self.task}: {self.ours} {seconds(self.our_seconds)}, {other}: **{times(self.ratio)} as fast**."


def comparisons(results: dict[str, Any]) -> Iterator[Comparison]:
    """Each pair of contenders that was timed in turn (or, where marked, predicted from such)."""
    rows = measured(rows_of(results, "headline"))
    for dtype, passes in distinct(rows, "dtype", "pass"):
        group = measured(rows, dtype=dtype, **{"pass": passes})
        others = [row for row in group if not row["contender"].startswith("farlight") and row["contender"] != "matmul"]
        for row in group:
            for other in others if row["contender"].startswith("farlight") else ():
                task = f"{dtype} {passes} at {row['tokens']:,} tokens"
                yield Comparison(task, row["contender"], row["seconds"], other["contender"], other["seconds"])
    for row in measured(rows_of(results, "length")):
        if "dense_seconds" in row:
            task = f"{row['dtype']} {row['pass']} at {row['tokens']:,} tokens"
            ours = f"farlight {row['backend']}"
            yield Comparison(task, ours, row["seconds"], "dense SDPA", row["dense_seconds"], row["dense_predicted"])
    for row in measured(rows_of(results, "routing")):
        task, ours = f"{row['pattern']}, {row['pass']} at {row['tokens']:,} tokens", "choosing, planning and attending"
        yield Comparison(task, ours, row["seconds"], "dense SDPA", row["dense_seconds"])
    for row in measured(rows_of(results, "models"), measure="layer"):
        task, ours = f"the links of {row['model']} at {row['tokens']:,} tokens, {row['dtype']}", f"farlight {row['backend']}"
        yield Comparison(task, ours, row["seconds"], "Hugging Face's attention", row["theirs_seconds"])
        yield Comparison(task, ours, row["seconds"], "dense SDPA", row["dense_seconds"])


def wins(results: dict[str, Any]) -> list[str]:
    return [one.sentence() for one in comparisons(results) if one.ratio >= 1]


def losses(results: dict[str, Any]) -> list[str]:
    """Every comparison below 1, short calls, short texts by pattern, and patterns that do not keep the window's rate."""
    found = [one.sentence() for one in comparisons(results) if one.ratio < 1]
    for row in measured(rows_of(results, "scaling"), measure="call overhead"):
        if row.get("over_sdpa_us", 0) > 0:
            where = f"A call on {row['tokens']} tokens ({row['heads']} heads, {row['dtype']}) by {row['contender']}"
            found.append(f"{where} takes {row['over_sdpa_us']:.0f} µs more than dense SDPA's {row['sdpa_us']:.0f} µs.")
    found += _short_texts(measured(rows_of(results, "breakeven")))
    found += _slow_patterns(measured(rows_of(results, "patterns")))
    return found


def _short_texts(rows: list[Row]) -> Iterator[str]:
    """For each length the patterns that dense attention beats there."""
    for dtype, passes, backend in distinct(rows, "dtype", "pass", "backend"):
        group = measured(rows, dtype=dtype, backend=backend, **{"pass": passes})
        for n in sorted({n for row in group for n in row["times_dense"]}, key=int):
            here = {row["pattern"]: row["times_dense"][n] for row in group if n in row["times_dense"]}
            slow = ", ".join(f"{code(name)} {times(ratio)}" for name, ratio in here.items() if ratio < 1)
            count = sum(ratio < 1 for ratio in here.values())
            if slow:
                of = f"{count} of {len(here)} patterns lose to dense attention"
                yield f"{dtype} {passes} at {int(n):,} tokens, backend {backend}: {of}: {slow}."


def _slow_patterns(rows: list[Row]) -> Iterator[str]:
    for (name,) in distinct(rows, "pattern"):
        slow = [row for row in measured(rows, pattern=name) if row.get("rate_of_window", 1.0) < 0.95]
        if slow:
            rates = ", ".join(f"{share(row['rate_of_window'])} in {kind(row)}" for row in slow)
            yield f"{code(name)} keeps only a part of the plain window's useful rate: {rates}."


def missing(results: dict[str, Any]) -> list[str]:
    """What has no figure, and why; equal reasons told once."""
    reasons: dict[str, list[str]] = {}
    for name, section in results["sections"].items():
        if not section["complete"]:
            reasons.setdefault(section.get("error", "the run ended before it was complete"), []).append(f"section {name}")
        for row in section["rows"]:
            why = row.get("skipped") or row.get("error") or row.get("memory_error")
            if why:
                kept = ("measure", "model", "pattern", "contender", "backend", "tokens", "head_dim", "pass")
                words = [str(row[column]) for column in kept if column in row] + [DTYPES.get(row.get("dtype", ""), "")]
                what = "memory of " if "memory_error" in row else ""
                reasons.setdefault(why, []).append(f"{name}: {what}{' '.join(word for word in words if word)}")
    return [f"{'; '.join(what)}: {why}" for why, what in reasons.items()]
