"""What farlight's own tests stand on, shipped so that a backend written elsewhere can be held to the same standard.

`cases` is the shared list of problems, `oracle` the answer by the book in float64, `tolerance` the one rule of how close is
close enough. Needs torch only; `strategies` (random patterns for hypothesis) is imported apart.
"""

from farlight.testing.cases import CASES, Case, Inputs, case, inputs
from farlight.testing.oracle import Answer, Solution, attend, kept_links, solve
from farlight.testing.tolerance import assert_answer, assert_matches

__all__ = [
    "CASES",
    "Answer",
    "Case",
    "Inputs",
    "Solution",
    "assert_answer",
    "assert_matches",
    "attend",
    "case",
    "inputs",
    "kept_links",
    "solve",
]
