"""The exceptions that farlight raises on purpose.

Each message says what was asked, what was found, why it cannot be and what to do. All derive from `FarlightError`, and
also from the built-in exception that a caller would expect, so that `except ValueError` keeps working.
"""

from __future__ import annotations

import reprlib

__all__ = [
    "ArgumentError",
    "DistributedError",
    "FarlightError",
    "OperandError",
    "PatternError",
    "PlanError",
    "UnsupportedError",
    "refuse_tracing",
    "shorten",
    "show",
]


class FarlightError(Exception):
    """Base of every error that farlight raises on purpose."""


class ArgumentError(FarlightError, ValueError):
    """A tensor or number given to a public function cannot be used."""


class PatternError(FarlightError, ValueError):
    """A pattern is malformed, or does not fit the sizes it is asked about."""


class OperandError(PatternError, TypeError):
    """Patterns are combined by `and`, `or`, `not`, or with something that is not a pattern."""


class PlanError(FarlightError, ValueError):
    """A plan is malformed, or was built for other sizes."""


class UnsupportedError(FarlightError, NotImplementedError):
    """The request is meaningful, but the named backend or model cannot serve it."""


class DistributedError(FarlightError, RuntimeError):
    """A collective among ranks failed: a rank is lost, took too long, or called with other arguments."""


_FEW = 6


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to spell a number of thousands of digits.
        return repr(x) if x.bit_length() <= 256 else f"a number of {x.bit_length()} bits"


_short = _Short()
_short.maxlist = _short.maxtuple = _short.maxset = _short.maxdict = _short.maxarray = _FEW
_short.maxlevel = 3
_short.maxstring = _short.maxother = 80
_short.fillvalue = "…"


def show(value: object) -> str:
    """A value for an error message, in about 100 characters: tensors and arrays by shape, dtype and first entries.

    >>> import torch
    >>> show(torch.zeros(2, 500)), show(list(range(100)))
    ('a (2, 500) float32 tensor [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, …]', '[0, 1, 2, 3, 4, 5, …]')
    """
    name = type(value).__name__
    if name in ("Tensor", "Parameter", "ndarray"):
        dtype = str(value.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
        what = f"a {tuple(value.shape)} {dtype} {'array' if name == 'ndarray' else 'tensor'}"  # type: ignore[attr-defined]
        if getattr(value, "is_meta", False):
            return what
        first = value.reshape(-1)[: _FEW + 1].tolist()  # type: ignore[attr-defined]
        return shorten(f"{what} {_short.repr(first)}", 120)
    return shorten(_short.repr(value), 120)


def shorten(text: str, length: int = 80) -> str:
    """The text on one line, cut to `length` characters."""
    # Far more than is kept is not even looked at: the text may be a table of many megabytes.
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length and len(text) <= 4 * length else line[: length - 1] + "…"


def refuse_tracing(who: str) -> None:
    """Raise UnsupportedError under torch.jit.trace, which would record the values read in this call as constants."""
    import torch

    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise UnsupportedError(
            f"{who}: torch.jit.trace keeps what is read from a tensor as a constant, a mask as the padding of this one example "
            "too. Use torch.export.export, which keeps the masks, or torch.compile."
        )
