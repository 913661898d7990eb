"""Patterns: immutable sets of allowed (batch, head, query position, key), combined with `|`, `&`, `-` and `~`.

| modules | contents |
|---|---|
| `sizes`, `forms`, `spans` | problem sizes, the forms of a primitive, sorted key intervals |
| `expression`, `algebra` | `Pattern` and `Atom`; union, intersection, difference, complement, `per_head` |
| `positional`, `named`, `packing`, `grid`, `random`, `tables`, `membership`, `multi_label`, `uncovered` | the primitives |
| `intervals`, `converters` | key intervals by row, and patterns of masks, edges, graphs, mask functions, block masks |
| `presets` | published patterns, composed of primitives |
| `arguments`, `deferred` | validation of constructor arguments; tensors whose values cannot be read yet |
| `registry`, `notation`, `json_format`, `table_codec` | patterns as text and as JSON |
| `hashing` | counter-based random numbers, also of dropout |
| `liveness` | the last query position that a key is allowed to |
"""

from farlight.patterns import presets
from farlight.patterns.algebra import per_head
from farlight.patterns.converters import from_block_mask, from_dense, from_edges, from_graph, from_mask_mod, from_sparse
from farlight.patterns.expression import Pattern
from farlight.patterns.grid import neighborhood
from farlight.patterns.intervals import intervals
from farlight.patterns.membership import between, rooms
from farlight.patterns.multi_label import meets
from farlight.patterns.named import global_tokens, seen_by_all, sees_all
from farlight.patterns.notation import parse
from farlight.patterns.packing import documents, padding, prefix_lm
from farlight.patterns.positional import blocked_window, causal, full, landmarks, offsets, strided, window
from farlight.patterns.random import random_blocks, random_keys
from farlight.patterns.registry import register
from farlight.patterns.sizes import Sizes
from farlight.patterns.tables import blocks, chosen_blocks, chosen_keys, clusters, pairs
from farlight.patterns.uncovered import unseen

# The constructors of `farlight.*`, by name.
CONSTRUCTORS = (
    "blocked_window",
    "blocks",
    "causal",
    "chosen_blocks",
    "chosen_keys",
    "clusters",
    "documents",
    "full",
    "global_tokens",
    "landmarks",
    "neighborhood",
    "offsets",
    "padding",
    "pairs",
    "per_head",
    "random_blocks",
    "random_keys",
    "seen_by_all",
    "sees_all",
    "strided",
    "window",
)

# Functions that make patterns of what others have; their results are written with the primitives.
CONVERTERS = ("from_block_mask", "from_dense", "from_edges", "from_graph", "from_mask_mod", "from_sparse")

for _name in CONSTRUCTORS:
    register(globals()[_name], _name)
register(prefix_lm)
for _name in presets.__all__:
    register(getattr(presets, _name), _name, f"presets.{_name}")
# Primitives that routers produce, public as `farlight.routing.*`, and the one that converters produce.
for _constructor in (between, intervals, meets, rooms, unseen):
    register(_constructor)

__all__ = [
    "CONSTRUCTORS",
    "CONVERTERS",
    "Pattern",
    "Sizes",
    "blocked_window",
    "blocks",
    "causal",
    "chosen_blocks",
    "chosen_keys",
    "clusters",
    "documents",
    "from_block_mask",
    "from_dense",
    "from_edges",
    "from_graph",
    "from_mask_mod",
    "from_sparse",
    "full",
    "global_tokens",
    "landmarks",
    "neighborhood",
    "offsets",
    "padding",
    "pairs",
    "parse",
    "per_head",
    "prefix_lm",
    "presets",
    "random_blocks",
    "random_keys",
    "seen_by_all",
    "sees_all",
    "strided",
    "window",
]
