"""A pattern as a graph: a link from key j to query i lets i hear of j in one layer. How far does news travel?"""

from farlight.analysis.graph.paths import Hop, Path, path
from farlight.analysis.graph.reachability import Reach, reach
from farlight.analysis.graph.small_world import SmallWorld, smallworld

__all__ = ["Hop", "Path", "Reach", "SmallWorld", "path", "reach", "smallworld"]
