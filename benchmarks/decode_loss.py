"""Loss of a language model that reads a text through caches of each stored dtype, against the exact float32 cache.

    python benchmarks/decode_loss.py --text book.txt

Passages spread evenly over the text form one batch. The model is fed `--chunk` tokens at a time, teacher-forced, and
each chunk attends over what the cache has stored of itself and of all chunks before; below 64 tokens by the kernels that also
serve single tokens. Printed: mean next-token loss in nats over all passages, its difference from the unrounded cache, and the
largest of the differences of one passage.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import farlight as fl
from farlight.analysis.passages import cut_passages
from farlight.cli.inputs import read_text
from farlight.hf.loading import load_model

STORED: dict[str, Any] = {"as appended": None, "bfloat16": torch.bfloat16, "int8": "int8"}


def losses(model: Any, ids: Tensor, chunk: int, dtype: Any) -> Tensor:
    """Mean next-token loss of each passage `(B,)` when the model reads chunk by chunk through a cache of this dtype."""
    cache = fl.hf.SparseCache(model, fl.causal(), dtype=dtype)
    total = torch.zeros(len(ids), dtype=torch.float64)
    for at in range(0, ids.shape[1] - 1, chunk):
        stop = min(at + chunk, ids.shape[1] - 1)
        logits = model(ids[:, at:stop], past_key_values=cache).logits
        total += cross_entropy(logits.transpose(1, 2).double(), ids[:, at + 1 : stop + 1], reduction="none").sum(1)
    return total / (ids.shape[1] - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, or a name of the hub")
    parser.add_argument("--text", type=Path, help="a text file; default: Python's manual")
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=32)
    options = parser.parse_args()
    loaded = load_model(options.model)
    ids = cut_passages(read_text(options.text)[1], loaded.tokenizer, options.length, options.passages, spread=True).ids
    print("| stored as | loss, nats | difference | largest of one passage |\n|---|---|---|---|")
    exact = None
    with torch.inference_mode():
        for name, dtype in STORED.items():
            each = losses(loaded.model, ids, options.chunk, dtype)
            exact = each if exact is None else exact
            difference = each - exact
            most = float(difference.abs().max())
            print(f"| {name} | {float(each.mean()):.5f} | {float(difference.mean()):+.5f} | {most:.5f} |", flush=True)


if __name__ == "__main__":
    main()
