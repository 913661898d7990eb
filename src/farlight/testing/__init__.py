"""farlight's test oracle, shipped so that a backend written elsewhere can be held to the same specification.

`cases` and `case_list` are the shared attention problems, `oracle` the float64 truth and a same-dtype baseline, `tolerance` the
one rule for comparing with them. Needs torch only; `strategies` (random patterns for hypothesis) is imported separately.
"""

from farlight.testing.case_list import CASES, case
from farlight.testing.cases import Case, Inputs, inputs
from farlight.testing.oracle import Answer, Solution, attend, dropout_mask, solve
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
    "dropout_mask",
    "inputs",
    "solve",
]
