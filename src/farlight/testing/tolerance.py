"""The comparison used by every parity test: errors against the rounding of the same formula in plain torch at the same dtype.

There are no absolute tolerances to tune. A change that loosens the rule has to state its reason here.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from farlight.testing.oracle import Answer, Solution

__all__ = ["assert_answer", "assert_matches"]


def assert_matches(actual: Tensor, truth: Tensor, baseline: Tensor, what: str, *, magnitude: Tensor | None = None) -> None:
    """Raise AssertionError unless `actual` is as close to the float64 `truth` as `baseline` (plain torch) is, within a factor
    of 2.

    A row is the last dimension of a 4-D tensor, or one element of a tensor of fewer dimensions; its error is the largest
    |actual - truth| in it. With m the row's magnitude (of `magnitude`, by default |truth|; the largest of the row) and u the
    machine epsilon of actual's dtype plus that of float64 (the truth is rounded too), the condition is

        error[row]      <= 2 · m · max over rows of (baseline's error / m)  +  2 u m        for each row,
        mean(error / m) <= 2 · mean(baseline's error / m)  +  2 u                          over all rows.

    Errors relative to each row's own magnitude expose a wrong row of small numbers among large ones. Where m = 0 the result
    must be exact. Infinities must be where truth has them; NaN is never accepted.
    """
    actual, baseline = actual.detach().cpu(), baseline.detach().cpu()
    if actual.shape != truth.shape:
        raise AssertionError(f"{what}: the shape is {tuple(actual.shape)}, it must be {tuple(truth.shape)}")
    if not actual.numel():
        return
    unit = torch.finfo(actual.dtype).eps + torch.finfo(torch.float64).eps
    value = actual.double()
    wrong = value.isnan() | (value.isinf() != truth.isinf()) | (value.isinf() & (value != truth))
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        problem = f"{int(wrong.sum())} elements are NaN, or infinite where the truth is not, or finite where it is"
        raise AssertionError(f"{what}: {problem}: at {at} got {float(value[at])}, truth {float(truth[at])}")

    finite = truth.isfinite()
    zero = torch.zeros_like(value)
    error = torch.where(finite, (value - truth).abs(), zero)
    rounding = torch.where(finite, (baseline.double() - truth).abs(), zero)
    size = torch.where(finite, truth.abs() if magnitude is None else magnitude, zero)
    if truth.dim() == 4:
        error, element = error.max(-1)
        rounding, size = rounding.amax(-1), size.amax(-1)
    else:
        element = None
    # Magnitude 0 means no terms: plain torch is exact as well.
    relative = torch.where(size > 0, rounding / size, 0.0)
    allowed = (2 * relative.max() + unit * 2) * size
    if bool((error > allowed).any()):
        row = int((error - allowed).argmax())
        row_index = tuple(int(x) for x in torch.unravel_index(torch.tensor(row), error.shape))
        index = row_index if element is None else (*row_index, int(element[row_index]))
        raise AssertionError(
            f"{what}: {int((error > allowed).sum())} of {error.numel()} rows are wrong, the worst at {row_index}: "
            f"got {float(value[index]):.9g}, truth {float(truth[index]):.9g}, error {float(error[row_index]):.3g}, "
            f"allowed {float(allowed[row_index]):.3g} (plain torch: {float(rounding[row_index]):.3g})"
        )
    nonzero = size > 0
    if bool(nonzero.any()):
        mean, allowed_mean = float((error[nonzero] / size[nonzero]).mean()), float(2 * relative[nonzero].mean() + 2 * unit)
        if mean > allowed_mean:
            raise AssertionError(f"{what}: the mean error is {mean:.3g} of the magnitude, allowed {allowed_mean:.3g}")


def assert_answer(actual: Answer, solution: Solution, what: str) -> int:
    """`assert_matches` on the output, the lse and the three gradients. Returns the number of comparisons."""
    fields = dataclasses.fields(Answer)
    for field in fields:
        result, truth, baseline, size = (
            getattr(x, field.name) for x in (actual, solution.truth, solution.baseline, solution.magnitude)
        )
        assert_matches(result, truth, baseline, f"{what}: {field.name}", magnitude=size)
    return len(fields)
