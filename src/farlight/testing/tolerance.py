"""How close is close enough: one helper, used by every parity test, the same everywhere.

An error is judged against what rounding does to the same maths in plain torch at the same dtype. Loosening it needs a
reason in writing.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from farlight.testing.oracle import Answer, Solution

__all__ = ["assert_answer", "assert_matches"]


def assert_matches(actual: Tensor, truth: Tensor, yardstick: Tensor, what: str, *, magnitude: Tensor | None = None) -> None:
    """Raise AssertionError unless `actual` is as close to `truth` (float64) as plain torch is, within a factor of two.

    A row is the last dimension (the last two would be many rows); its error is the largest of its elements. With
    m = the row's magnitude (the size of what was added up; by default its largest |truth|) and u = the rounding unit of
    actual's dtype plus that of float64, in which the truth is rounded too, it must hold that

        error[row]      <= 2 · m · max over rows of (yardstick's error / m)  +  2 u m        for each row,
        mean(error / m) <= 2 · mean(yardstick's error / m)  +  2 u                          over all rows.

    Errors are measured against each row's own magnitude, so that one wrong row shows however small its numbers are. Where
    m = 0 nothing is added up and the result must be exactly right. Infinities must stand exactly where truth has them,
    and NaN nowhere.
    """
    actual, yardstick = actual.detach().cpu(), yardstick.detach().cpu()
    if actual.shape != truth.shape:
        raise AssertionError(f"{what}: the shape is {tuple(actual.shape)}, it must be {tuple(truth.shape)}")
    if not actual.numel():
        return
    unit = torch.finfo(actual.dtype).eps + torch.finfo(torch.float64).eps
    got = actual.double()
    wrong = got.isnan() | (got.isinf() != truth.isinf()) | (got.isinf() & (got != truth))
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        many = f"{int(wrong.sum())} elements are NaN, or infinite where the truth is not, or finite where it is"
        raise AssertionError(f"{what}: {many}: at {at} got {float(got[at])}, truth {float(truth[at])}")

    finite = truth.isfinite()
    zero = torch.zeros_like(got)
    error = torch.where(finite, (got - truth).abs(), zero)
    unavoidable = torch.where(finite, (yardstick.double() - truth).abs(), zero)
    size = torch.where(finite, truth.abs() if magnitude is None else magnitude, zero)
    if truth.dim() == 4:
        error, at_dim = error.max(-1)
        unavoidable, size = unavoidable.amax(-1), size.amax(-1)
    else:
        at_dim = None
    # Where nothing is added up, plain torch is exact as well; there the share stays 0.
    share = torch.where(size > 0, unavoidable / size, 0.0)
    allowed = (2 * share.max() + unit * 2) * size
    if bool((error > allowed).any()):
        row = int((error - allowed).argmax())
        place = tuple(int(x) for x in torch.unravel_index(torch.tensor(row), error.shape))
        full = place if at_dim is None else (*place, int(at_dim[place]))
        raise AssertionError(
            f"{what}: {int((error > allowed).sum())} of {error.numel()} rows are wrong, the worst at {place}: "
            f"got {float(got[full]):.9g}, truth {float(truth[full]):.9g}, error {float(error[place]):.3g}, "
            f"allowed {float(allowed[place]):.3g} (plain torch: {float(unavoidable[place]):.3g})"
        )
    real = size > 0
    if bool(real.any()):
        mean, allowed_mean = float((error[real] / size[real]).mean()), float(2 * share[real].mean() + 2 * unit)
        if mean > allowed_mean:
            raise AssertionError(f"{what}: the mean error is {mean:.3g} of the magnitude, allowed {allowed_mean:.3g}")


def assert_answer(actual: Answer, solution: Solution, what: str) -> int:
    """`assert_matches` on the output, the lse and the three gradients; the number of comparisons made."""
    fields = dataclasses.fields(Answer)
    for field in fields:
        one, truth, yardstick, size = (
            getattr(x, field.name) for x in (actual, solution.truth, solution.yardstick, solution.magnitude)
        )
        assert_matches(one, truth, yardstick, f"{what}: {field.name}", magnitude=size)
    return len(fields)
