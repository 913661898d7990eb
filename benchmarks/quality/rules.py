"""The rules whose cost in loss is measured: who proposed each, and its expression for a length of text."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SINKS", "Rule", "rules"]

SINKS = "seen_by_all([0, 1, 2, 3])"
NEAR = f"window(32, 0) | {SINKS}"


@dataclass(frozen=True)
class Rule:
    """One rule: its family, the paper that proposed it ("" where none did), and its expression, or the name of a fit's
    file."""

    family: str
    source: str
    expression: str

    @property
    def reads_every_score(self) -> bool:
        """Whether the rule reads every score before it chooses."""
        return self.expression.startswith(("topkeys", "keys-"))

    @property
    def by_content(self) -> bool:
        """Whether the rule reads queries and keys."""
        return self.expression.startswith(("topkeys", "topblocks", "lsh", "kmeans")) or self.expression.endswith(".json")


def rules(tokens: int) -> list[Rule]:
    """The rules for texts of this many tokens; widths and counts grow with the length, block sizes do not."""
    times = max(1, tokens // 2048)
    return [
        *_chosen(times),
        *_positional(times),
    ]


def _blocks(count: int, block: int, options: str = "") -> str:
    return f"topblocks({count}, block={block}, causal=True{options}) | {NEAR}"


def _positional(times: int) -> list[Rule]:
    """Rules that know positions only."""
    rows: list[Rule] = []
    for width in (128, 512):
        rows.append(Rule("window", "Beltagy et al. 2020, arXiv:2004.05150", f"window({width * times}, 0)"))
    for width in (128, 64, 32, 256, 512):
        rows.append(Rule("window, sinks", "StreamingLLM, arXiv:2309.17453", f"window({width * times}, 0) | {SINKS}"))
    for width, stride in ((64, 32), (112, 128), (128, 16)):
        expression = f"window({width * times}, 0) | {SINKS} | landmarks({stride})"
        rows.append(Rule("window, sinks, landmarks", "the founding article's lighthouses", expression))
    for width, count in ((64, 64), (112, 16), (128, 128)):
        expression = f"window({width * times}, 0) | {SINKS} | random_keys({count * times}, causal=True)"
        rows.append(Rule("window, sinks, random keys", "BigBird, arXiv:2007.14062", expression))
    for width in (120, 248):
        expression = f"presets.longformer(window={2 * width * times}, global_positions=(0, 1, 2, 3), autoregressive=True)"
        rows.append(Rule("Longformer", "Beltagy et al. 2020, arXiv:2004.05150", expression))
    for dilation in (2, 8):
        expression = f"window(32, 0) | window({96 * times}, 0, dilation={dilation}) | {SINKS}"
        rows.append(Rule("dilated window", "Beltagy et al. 2020, arXiv:2004.05150", expression))
    for stride in (32, 128):
        expression = f"window({stride * times}, 0) | strided({stride}) | {SINKS}"
        rows.append(Rule("strided", "Sparse Transformer, arXiv:1904.10509", expression))
    return rows


def _chosen(times: int) -> list[Rule]:
    """Rules that read queries and keys."""
    shared = ', query_block=16, score="softmax"'
    rows: list[Rule] = []
    for count, block in ((12, 8), (8, 8), (16, 8), (24, 8), (24, 4), (6, 16), (4, 8)):
        rows.append(Rule("small blocks, one choice of 16 queries", "farlight", _blocks(count * times, block, shared)))
    for count in (12, 24):
        options = f'{shared}, per="group"'
        rows.append(
            Rule("the same, one choice of a group of heads", "NSA, arXiv:2502.11089", _blocks(count * times, 8, options))
        )
    for count in (12, 24, 48):
        rows.append(Rule("small blocks by mean, each query", "farlight", _blocks(count * times, 8 if count < 48 else 4)))
    for count, block in ((8, 16), (12, 8), (16, 16)):
        rows.append(Rule("blocks by bounds", "Quest, arXiv:2406.10774", _blocks(count * times, block, ', score="minmax"')))
    for count, block in ((2, 64), (4, 32), (4, 64)):
        rows.append(Rule("large blocks by mean", "MoBA, arXiv:2502.13189", _blocks(count * times, block)))
    for share in (0.06, 0.12):
        expression = f"topblocks(share={share}, block=8, causal=True{shared}) | {NEAR}"
        rows.append(Rule("small blocks by share of the text", "farlight", expression))
    for block in (4, 2):
        expression = f"topblocks(share=0.11, block={block}, causal=True{shared}) | {NEAR}"
        rows.append(Rule("blocks of 4 and 2 keys by share of the text", "farlight", expression))
    for mass in (0.8, 0.9, 0.95):
        expression = f"topblocks(mass={mass}, block=8, causal=True{shared}) | {NEAR}"
        rows.append(Rule("small blocks by mass", "Twilight, arXiv:2502.02770", expression))
    for buckets, rounds in ((16, 2), (8, 2)):
        expression = f"lsh({buckets}, {rounds}, causal=True) | {NEAR}"
        rows.append(Rule("LSH", "Reformer, arXiv:2001.04451", expression))
    for clusters in (12, 6):
        expression = f"kmeans({clusters}, causal=True) | {NEAR}"
        rows.append(Rule("k-means", "Routing Transformer, arXiv:2003.05997", expression))
    for count in (128, 64, 32):
        expression = f"topkeys({count * times}, causal=True) | {SINKS}"
        rows.append(Rule("top keys by exact score", "arXiv:2106.06899", expression))
    return rows
