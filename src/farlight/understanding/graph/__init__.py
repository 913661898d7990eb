"""A pattern as a graph: a link from key j to query i lets i hear of j in one layer. How far does news travel?"""

from farlight.understanding.graph.paths import Hop, Path, path
from farlight.understanding.graph.receptive import Reach, reach
from farlight.understanding.graph.worlds import SmallWorld, smallworld

__all__ = ["Hop", "Path", "Reach", "SmallWorld", "path", "reach", "smallworld"]
