"""farlight: exact sparse attention for long texts, and a measure of what was lost by not looking."""

from farlight import distributed, embedding, hf, nn, routing, score
from farlight._version import __version__ as __version__
from farlight.analysis.fit import Fit, fit
from farlight.analysis.graph import Path, Reach, SmallWorld, path, reach, smallworld
from farlight.analysis.loss.retention import Retention, retention
from farlight.analysis.recall import evaluate
from farlight.attention import attention
from farlight.decoding import KVCache, decode, step
from farlight.errors import ArgumentError, DistributedError, FarlightError, PatternError, PlanError, UnsupportedError
from farlight.explanation import Explanation, explain
from farlight.merge import merge
from farlight.patterns import (
    Pattern,
    blocked_window,
    blocks,
    causal,
    chosen_blocks,
    chosen_keys,
    clusters,
    documents,
    from_block_mask,
    from_dense,
    from_edges,
    from_graph,
    from_mask_mod,
    from_sparse,
    full,
    global_tokens,
    landmarks,
    neighborhood,
    offsets,
    padding,
    pairs,
    parse,
    per_head,
    prefix_lm,
    presets,
    random_blocks,
    random_keys,
    seen_by_all,
    sees_all,
    strided,
    window,
)
from farlight.plan import Plan
from farlight.planning import plan
from farlight.varlen import packed_attention

__all__ = [
    "ArgumentError",
    "DistributedError",
    "Explanation",
    "FarlightError",
    "Fit",
    "KVCache",
    "Path",
    "Pattern",
    "PatternError",
    "Plan",
    "PlanError",
    "Reach",
    "Retention",
    "SmallWorld",
    "UnsupportedError",
    "attention",
    "blocked_window",
    "blocks",
    "causal",
    "chosen_blocks",
    "chosen_keys",
    "clusters",
    "decode",
    "distributed",
    "documents",
    "embedding",
    "evaluate",
    "explain",
    "fit",
    "from_block_mask",
    "from_dense",
    "from_edges",
    "from_graph",
    "from_mask_mod",
    "from_sparse",
    "full",
    "global_tokens",
    "hf",
    "landmarks",
    "merge",
    "neighborhood",
    "nn",
    "offsets",
    "packed_attention",
    "padding",
    "pairs",
    "parse",
    "path",
    "per_head",
    "plan",
    "prefix_lm",
    "presets",
    "random_blocks",
    "random_keys",
    "reach",
    "retention",
    "routing",
    "score",
    "seen_by_all",
    "sees_all",
    "smallworld",
    "step",
    "strided",
    "window",
]


def __dir__() -> list[str]:
    """The public names and the version: no submodules that are not among them."""
    return sorted([*__all__, "__version__"])
