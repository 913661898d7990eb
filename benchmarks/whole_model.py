"""A whole Llama-shaped model with random weights, dense and sparse: seconds of one pass, both sides in one run.

    python benchmarks/whole_model.py [--tokens 8192 16384] [--train] [--repeats 3]

4 layers of width 512, 8 heads of 64 on 4 key heads, MLP 1376, float32. The projections and the MLP are in every figure and
are not made faster by sparse attention: with them, a model can gain less than its attention alone.
"""

from __future__ import annotations

import argparse
import platform

import torch
import transformers
from transformers import LlamaConfig, LlamaModel

import farlight as fl
from farlight.bench.timing import Contender, interleaved

PATTERNS = {
    "sdpa": None,
    "farlight, the model's own causal mask": fl.causal(),
    "farlight, streaming(4, 1024)": fl.presets.streaming(4, 1024),
    "farlight, streaming(4, 256)": fl.presets.streaming(4, 256),
}


def llama() -> LlamaModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**shape, intermediate_size=1376, vocab_size=1000, max_position_embeddings=1 << 20)
    model = LlamaModel(config)
    model.set_attn_implementation("sdpa")
    return model


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, nargs="+", default=[8192])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--train", action="store_true", help="time a forward and backward pass")
    given = options.parse_args()
    models = {name: llama() for name in PATTERNS}
    for name, pattern in PATTERNS.items():
        if pattern is not None:
            fl.hf.sparsify(models[name], pattern)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__},")
    print(
        f"transformers {transformers.__version__}, farlight {fl.__version__}; {'training step' if given.train else 'prefill'}"
    )
    for tokens in given.tokens:
        ids = torch.randint(1000, (1, tokens))

        def run(model: LlamaModel, ids: torch.Tensor = ids) -> None:
            with torch.set_grad_enabled(given.train):
                out = model(input_ids=ids, use_cache=False).last_hidden_state
            if given.train:
                out.square().mean().backward()

        contenders = [Contender(name, lambda model=model: run(model)) for name, model in models.items()]  # type: ignore[misc]
        timings = interleaved(contenders, repeats=given.repeats, budget=100.0)
        dense = timings["sdpa"].seconds
        for name, timing in timings.items():
            told = timing.error or f"{dense / timing.seconds:5.2f} × as fast as sdpa"
            print(f"{tokens:7} tokens  {name:40} {timing.seconds:8.2f} s  {told}")


if __name__ == "__main__":
    main()
