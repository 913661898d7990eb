"""Fitting: the cheapest pattern for each head that keeps enough of full attention, found among candidates."""

from farlight.analysis.fit.fit import Fit, fit
from farlight.analysis.fit.frontier import Option, allocate, concave

__all__ = ["Fit", "Option", "allocate", "concave", "fit"]
