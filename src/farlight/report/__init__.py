"""A report as one HTML file: the pattern to zoom into, paths on the text, reach, cost, and what was lost, head by head."""

from farlight.report.data import audit_data, map_data, steps
from farlight.report.page import render, write
from farlight.report.words import words_of

__all__ = ["audit_data", "map_data", "render", "steps", "words_of", "write"]
