"""The exceptions that farlight raises on purpose.

Each message says what was asked, what was found, why it cannot be and what to do. All derive from `FarlightError`, and
also from the built-in exception that a caller would expect, so that `except ValueError` keeps working.
"""

from __future__ import annotations

__all__ = ["ArgumentError", "FarlightError", "PatternError", "PlanError", "UnsupportedError"]


class FarlightError(Exception):
    """Base of every error that farlight raises on purpose."""


class ArgumentError(FarlightError, ValueError):
    """A tensor or number given to a public function cannot be used."""


class PatternError(FarlightError, ValueError):
    """A pattern is malformed, or does not fit the sizes it is asked about."""


class PlanError(FarlightError, ValueError):
    """A plan is malformed, or was built for other sizes."""


class UnsupportedError(FarlightError, NotImplementedError):
    """The request is meaningful, but the named backend or model cannot serve it."""
