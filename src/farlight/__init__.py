"""farlight: exact sparse attention for long texts, and a measure of what was lost by not looking."""

from farlight import distributed, hf, nn, routing, score
from farlight._version import __version__ as __version__
from farlight.analysis.fit import Fit, fit
from farlight.analysis.graph import Path, Reach, SmallWorld, path, reach, smallworld
from farlight.analysis.loss.retention import Retention, retention
from farlight.attention import attention, explain
from farlight.decoding import KVCache, decode
from farlight.errors import ArgumentError, DistributedError, FarlightError, PatternError, PlanError, UnsupportedError
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
    full,
    global_tokens,
    landmarks,
    offsets,
    padding,
    pairs,
    parse,
    per_head,
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

__all__ = [
    "ArgumentError",
    "DistributedError",
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
    "explain",
    "fit",
    "full",
    "global_tokens",
    "hf",
    "landmarks",
    "merge",
    "nn",
    "offsets",
    "padding",
    "pairs",
    "parse",
    "path",
    "per_head",
    "plan",
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
    "strided",
    "window",
]
