"""A pattern as a directed graph: an edge key j → query i carries information from j to i in one layer.

`smallworld` measures path lengths, clustering and mixing; `path` finds one shortest path; `reach` gives the receptive field
by layer. All three read the pattern's positions only: no weights, no text.
"""

from farlight.analysis.graph.paths import Hop, Path, path
from farlight.analysis.graph.reachability import Reach, reach
from farlight.analysis.graph.small_world import SmallWorld, smallworld

__all__ = ["Hop", "Path", "Reach", "SmallWorld", "path", "reach", "smallworld"]
