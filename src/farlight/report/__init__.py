"""HTML report in one file: zoomable pattern matrix, paths on the text, reach by layer, cost, mass by head, top losses."""

from farlight.report.data import audit_data, map_data, maps_data, steps
from farlight.report.page import render, write
from farlight.report.weights import weights
from farlight.report.words import words_of

__all__ = ["audit_data", "map_data", "maps_data", "render", "steps", "weights", "words_of", "write"]
