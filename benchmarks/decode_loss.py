"""Loss of a language model that reads a text through caches of each stored dtype, against the exact float32 cache.

    python benchmarks/decode_loss.py --weights FOLDER --text book.txt

Passages from equally spaced places of the text form one batch. The model is fed `--chunk` tokens at a time, teacher-forced, and
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
from transformers import AutoModelForCausalLM, AutoTokenizer

import farlight as fl

STORED: dict[str, Any] = {"as appended": None, "bfloat16": torch.bfloat16, "int8": "int8"}


def passages(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """`(count, length)` token ids from equally spaced places of the text."""
    starts = [len(text) * (2 * i + 1) // (2 * count) for i in range(count)]
    return torch.stack([tokenizer(text[at : at + 12 * length], return_tensors="pt").input_ids[0, :length] for at in starts])


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
    parser.add_argument("--weights", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=32)
    options = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(options.weights, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.weights)
    ids = passages(tokenizer, options.text.read_text(), options.passages, options.length)
    print("| stored as | loss, nats | difference | largest of one passage |\n|---|---|---|---|")
    exact = None
    with torch.inference_mode():
        for name, dtype in STORED.items():
            each = losses(model, ids, options.chunk, dtype)
            exact = each if exact is None else exact
            difference = each - exact
            most = float(difference.abs().max())
            print(f"| {name} | {float(each.mean()):.5f} | {float(difference.mean()):+.5f} | {most:.5f} |", flush=True)


if __name__ == "__main__":
    main()
