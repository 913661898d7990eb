"""Fitting: for each head the pattern with the fewest links that keeps enough attention, chosen among candidate families."""

from farlight.analysis.fit.fit import Fit, fit
from farlight.analysis.fit.frontier import Option, allocate, concave

__all__ = ["Fit", "Option", "allocate", "concave", "fit"]
