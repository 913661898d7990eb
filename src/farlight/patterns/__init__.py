"""Who may look at whom: patterns as values."""

from farlight.patterns.algebra import per_head
from farlight.patterns.expression import Pattern, Sizes
from farlight.patterns.named import global_tokens, seen_by_all, sees_all
from farlight.patterns.notation import parse
from farlight.patterns.packing import documents, padding
from farlight.patterns.positional import blocked_window, causal, full, landmarks, offsets, strided, window
from farlight.patterns.random import random_blocks, random_keys
from farlight.patterns.tables import blocks, chosen_blocks, chosen_keys, clusters, pairs

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

__all__ = [
    "CONSTRUCTORS",
    "Pattern",
    "Sizes",
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
    "offsets",
    "padding",
    "pairs",
    "parse",
    "per_head",
    "random_blocks",
    "random_keys",
    "seen_by_all",
    "sees_all",
    "strided",
    "window",
]
