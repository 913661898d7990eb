"""How tight the bounds of missed attention are on a language model, and what they cost beside a plain count.

    python benchmarks/bound_tightness.py --text book.txt

SmolLM2-135M-Instruct reads one passage; queries and keys of some layers are kept. For each size of key block, printed are: for
`TopBlocks(lost=…)` the share of causal links, the true missed share and its proven bound, means over rows and heads and the
largest; and the same for the smallest `count` (score "softmax") that misses no more on average. Seconds are CPU seconds of one
thread for choosing, planning and attending one layer.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

import farlight as fl
from farlight.hf.loading import load_model
from farlight.routing import Router, TopBlocks
from quality.texts import passages

BLOCKS = (4, 8, 16, 32, 64)
QUERY_BLOCK = 16
NEAR = fl.window(32, 0) | fl.seen_by_all(range(4)) & fl.causal()


class Layer:
    """Queries, keys and values of one layer, and its full causal attention probabilities `(H, N, N)`."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.q, self.k, self.v = q, k, v
        self.n, self.heads = q.shape[2], q.shape[1]
        keys = k.repeat_interleave(self.heads // k.shape[1], 1)
        scores = (q[0].double() @ keys[0].double().transpose(-1, -2)) * q.shape[-1] ** -0.5
        later = torch.ones(self.n, self.n, dtype=torch.bool).triu(1)
        self.shares = scores.masked_fill(later, -torch.inf).softmax(-1).float()

    def missed(self, pattern: fl.Pattern) -> Tensor:
        """`(H, N)`: the true missed share of each row."""
        seen = fl.plan(pattern, self.n, heads=self.heads, backend="cpu").dense()[0]
        return self.shares.masked_fill(seen, 0.0).sum(-1)

    def density(self, pattern: fl.Pattern) -> float:
        plan = fl.plan(pattern, self.n, heads=self.heads, backend="cpu")
        return plan.pairs / (self.heads * fl.causal().count(self.n))

    def seconds(self, router: Router | fl.Pattern) -> float:
        """CPU seconds of one call, the median of three."""
        times = []
        for _ in range(4):
            start = time.process_time()
            fl.attention(self.q, self.k, self.v, router, backend="cpu")
            times.append(time.process_time() - start)
        return sorted(times[1:])[1]


def read_layers(path: Path, tokens: int, numbers: list[int]) -> list[Layer]:
    """These layers of the model on one passage of the text."""
    kept: dict[int, Layer] = {}

    def keeping(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if module.layer_idx in numbers:
            kept[module.layer_idx] = Layer(query, key, value)
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("keeping", keeping)
    loaded = load_model("smollm2")
    ((_, ids),) = passages([path], loaded.tokenizer, tokens, 1)
    loaded.model.set_attn_implementation("keeping")
    loaded.model(ids, use_cache=False)
    return [kept[number] for number in numbers]


def equal_count(layer: Layer, block: int, missed: float) -> tuple[TopBlocks, float]:
    """The smallest count that misses no more on average, and what it misses."""

    def tried(count: int) -> tuple[TopBlocks, float]:
        router = TopBlocks(count, block, QUERY_BLOCK, causal=True, score="softmax")
        return router, float(layer.missed((router | NEAR)(layer.q, layer.k)).mean())

    low, high = 0, -(-layer.n // block) + QUERY_BLOCK  # too few; enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tried(middle)[1] <= missed else (middle, high)
    return tried(high)


def rows_of(layer: Layer, block: int, lost: float) -> list[list[float]]:
    """(links, missed mean and largest, bound mean, seconds) of `lost`, and of the count of equal quality."""
    proven = TopBlocks(lost=lost, block=block, query_block=QUERY_BLOCK, causal=True) | NEAR
    missed = layer.missed(proven(layer.q, layer.k))
    counted = equal_count(layer, block, float(missed.mean()))[0] | NEAR
    rows = []
    for router in (proven, counted):
        pattern = router(layer.q, layer.k)
        true = layer.missed(pattern)
        _, bound = fl.attention(layer.q, layer.k, layer.v, pattern, return_lost=True, backend="cpu")
        assert bool((bound[0] >= true - 1e-5).all())
        rows.append([layer.density(pattern), float(true.mean()), float(true.max()), float(bound.mean()), layer.seconds(router)])
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layer", type=int, action="append", help="repeatable; default 4, 14 and 24")
    parser.add_argument("--lost", type=float, action="append", help="repeatable; default 0.02 and 0.2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    layers = read_layers(options.text, options.tokens, options.layer or [4, 14, 24])
    full = sum(layer.seconds(fl.causal()) for layer in layers) / len(layers)
    print(f"full causal attention: {full * 1e3:.1f} ms\n")
    print("| router | links | missed: mean | largest | proven: mean | seconds |\n|---|---:|---:|---:|---:|---:|")
    for lost in options.lost or (0.02, 0.2):
        for block in BLOCKS:
            both = torch.tensor([rows_of(layer, block, lost) for layer in layers]).mean(0).tolist()
            for name, row in zip((f"`lost={lost:g}`, blocks of {block}", "count of equal quality"), both, strict=True):
                links, mean, largest, bound, seconds = row
                print(
                    f"| {name} | {links:.1%} | {mean:.4f} | {largest:.3f} | {bound:.3f} | {seconds * 1e3:.1f} ms |", flush=True
                )


if __name__ == "__main__":
    main()
