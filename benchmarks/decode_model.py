"""Tokens per second and memory of a whole language model that generates behind a long text, with each kind of cache.

    python benchmarks/decode_model.py [--model smollm2] [--tokens 1024 4096 8192] [--dtype float32]

--model: smollm2, a folder, or a name of the hub. Without one: a Llama of SmolLM2-135M's shape (30 layers of width 576, 9 query
and 3 key heads of 64, 49 152 tokens), random.

The text behind the model is random keys and values, put into each cache directly: a step takes as long whatever they are. Then
`model.generate` writes a few tokens with each cache in turn, round after round; medians over the tokens are printed. The time
of a token is that between two calls of a streamer, so that all that `generate` does for a token counts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import farlight as fl
from farlight.hf.loading import load_model

SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 65_536,
    "tie_word_embeddings": True,
}
STREAMING = fl.presets.streaming(4, 1024)
CHOSEN = fl.routing.TopBlocks(16, 64, causal=True) | fl.presets.streaming(4, 256)
CACHES: dict[str, Callable[[Any], Any]] = {
    "DynamicCache + SDPA": lambda model: DynamicCache(config=model.config),
    "streaming(4, 1024)": lambda model: fl.hf.SparseCache(model, STREAMING),
    "TopBlocks(16, 64) or streaming(4, 256)": lambda model: fl.hf.SparseCache(model, CHOSEN),
    "the same, int8": lambda model: fl.hf.SparseCache(model, CHOSEN, dtype="int8"),
    "causal(), int8": lambda model: fl.hf.SparseCache(model, fl.causal(), dtype="int8"),
}


def twin(model: Any) -> Any:
    """A model of its own with the same weights in memory, since each pattern switches its model."""
    out = copy.deepcopy(model)
    for mine, given in zip(out.parameters(), model.parameters(), strict=True):
        mine.data = given.data
    return out


def fill(cache: Any, layers: list[tuple[Tensor, Tensor]]) -> None:
    """Put the same keys and values into every layer of a cache."""
    for number, (k, v) in enumerate(layers):
        if isinstance(cache, DynamicCache):
            cache.update(k, v, number)
        else:
            layer = cache.layers[number]
            layer.lazy_initialization(k, v)
            layer.cache.append(k, v)
            layer.cache.forget()


def num_bytes(cache: Any) -> int:
    if isinstance(cache, DynamicCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return int(cache.nbytes)


class Clock(BaseStreamer):
    """The seconds between two tokens of `generate`."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self) -> list[float]:
        """The first call is that of the prompt; the second token follows a step as all others do."""
        return [after - before for before, after in zip(self.times[1:], self.times[2:], strict=False)]


def measure(model: Any, tokens: int, rounds: int, steps: int) -> None:
    config = model.config
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    models = {name: twin(model) for name in CACHES}
    caches = {name: make(models[name]) for name, make in CACHES.items()}
    for cache in caches.values():
        generator = torch.Generator().manual_seed(0)
        pairs = (torch.randn(2, *shape, generator=generator).to(model.dtype) for _ in range(config.num_hidden_layers))
        fill(cache, [(k, v) for k, v in pairs])
    spent: dict[str, list[float]] = {name: [] for name in caches}
    text = {name: torch.full((1, tokens + 1), 11) for name in caches}
    for number in range(rounds + 1):
        for name, cache in caches.items():
            clock = Clock()
            options: dict[str, Any] = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "streamer": clock}
            text[name] = models[name].generate(text[name], past_key_values=cache, **options)
            spent[name] += clock.seconds() if number else []
    base = statistics.median(spent["DynamicCache + SDPA"])
    for name, seconds in spent.items():
        median = statistics.median(seconds)
        mib = num_bytes(caches[name]) / 2**20
        print(
            f"| {tokens:,} | {name} | {mib:.1f} | {1e3 * median:.1f} | {1 / median:.1f} | {base / median:.2f} × |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    model: Any
    if options.model:
        model = load_model(options.model).model.to(dtype)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).eval()
    fl.hf.register()
    print("| tokens | cache | MiB | ms per token | tokens per second | against DynamicCache |\n|---|---|---|---|---|---|")
    with torch.no_grad():
        for tokens in options.tokens:
            measure(model, tokens, options.rounds, options.steps)


if __name__ == "__main__":
    main()
