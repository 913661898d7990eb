"""Streaming generation of 100 000 tokens with a Llama-shaped model in constant memory and constant time per token.

The model (random weights, 4 layers) generates under `streaming(4, 1024)`: 4 sinks and the 1024 newest tokens. Its
`fl.hf.SparseCache` holds the keys that a later token can see, 1028 in each layer, and evicts the rest. The baseline is the same
model with full attention and transformers' DynamicCache, filled to several lengths: its memory and time grow with the text.

    python examples/stream.py                     # 100 000 tokens; several minutes
    python examples/stream.py --tokens 50000      # the first half; the next call resumes there
    python examples/stream.py --smoke             # seconds: a smoke test

Every 1000 tokens a record is appended to OUT/stream.json and the state saved beside it, so that a run can be resumed. After the
last token OUT/stream.png and OUT/stream.md are written.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import farlight as fl


@dataclass(frozen=True)
class Config:
    tokens: int = 100_000
    sinks: int = 4
    window: int = 1024
    every: int = 1000  # tokens per record
    layers: int = 4
    width: int = 256
    heads: int = 4
    vocabulary: int = 1000
    dense: tuple[int, ...] = (1024, 4096, 16_384, 65_536)  # lengths at which the baseline is measured
    steps: int = 20  # tokens generated at each of these lengths
    threads: int = 1
    seed: int = 0


SMOKE = Config(tokens=300, window=64, every=50, layers=2, width=32, heads=2, dense=(64, 128), steps=3)


def model_of(config: Config) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    sizes = LlamaConfig(
        hidden_size=config.width,
        intermediate_size=config.width * 11 // 4,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        vocab_size=config.vocabulary,
        max_position_embeddings=2 * config.tokens,
        eos_token_id=None,
    )
    fl.hf.register()
    model = LlamaForCausalLM(sizes).eval()
    model.set_attn_implementation("farlight")
    return model


def resident_bytes() -> int:
    """Resident set size of this process in bytes; its peak where /proc is missing."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.inference_mode()
def generate(
    model: Any, cache: Any, token: torch.Tensor, steps: int, generator: torch.Generator
) -> tuple[torch.Tensor, list[float]]:
    """Sample `steps` tokens one by one, starting after `token` `(1, 1)`: (the last token, the seconds of each step)."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        logits = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        seconds.append(time.perf_counter() - start)
    return token, seconds


def stream(config: Config, out: Path) -> list[dict[str, float]]:
    """Generate the stream, resuming from the saved state: the records, one per `every` tokens."""
    model = model_of(config)
    record, state = out / "stream.json", out / "stream.pt"
    generator = torch.Generator().manual_seed(config.seed)
    if state.exists():
        saved = torch.load(state, weights_only=False)
        lines, cache, token = json.loads(record.read_text()), saved["cache"], saved["token"]
        generator.set_state(saved["generator"])
    else:
        lines, token = [], torch.zeros(1, 1, dtype=torch.int64)
        cache = fl.hf.SparseCache(model, fl.presets.streaming(config.sinks, config.window))
    while cache.get_seq_length() < config.tokens:
        token, seconds = generate(model, cache, token, min(config.every, config.tokens - cache.get_seq_length()), generator)
        lines.append(
            {
                "tokens": cache.get_seq_length(),
                "milliseconds": statistics.median(seconds) * 1e3,
                "kept": cache.kept,
                "cache_bytes": cache.nbytes,
                "resident_bytes": resident_bytes(),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
        torch.save({"cache": cache, "token": token, "generator": generator.get_state()}, state)
        record.write_text(json.dumps(lines))
    return lines


def compare_dynamic_cache(config: Config, out: Path) -> list[dict[str, float]]:
    """Time and memory of a token with full attention and transformers' DynamicCache, at several lengths.

    The stream continues alternately with it, token by token, so that both are timed under the same load.
    """
    from transformers import DynamicCache

    sparse, dense = model_of(config), model_of(config)
    dense.set_attn_implementation("sdpa")
    saved = torch.load(out / "stream.pt", weights_only=False)
    generator = torch.Generator().manual_seed(config.seed)
    lines = []
    for length in config.dense:
        cache = DynamicCache(config=dense.config)
        for layer in range(config.layers):
            shape = (1, config.heads, length, config.width // config.heads)
            cache.update(torch.randn(shape), torch.randn(shape), layer)
        token, times = torch.zeros(1, 1, dtype=torch.int64), ([], [])  # type: tuple[torch.Tensor, tuple[list[float], list[float]]]
        for _ in range(config.steps):
            token, seconds = generate(dense, cache, token, 1, generator)
            times[0].extend(seconds)
            saved["token"], seconds = generate(sparse, saved["cache"], saved["token"], 1, generator)
            times[1].extend(seconds)
        cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        lines.append(
            {
                "tokens": length,
                "milliseconds": statistics.median(times[0]) * 1e3,
                "milliseconds_of_the_stream": statistics.median(times[1]) * 1e3,
                "cache_bytes": cache_bytes,
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    return lines


def table(sparse: list[dict[str, float]], dense: list[dict[str, float]], config: Config) -> str:
    from farlight.cli.doctor import examine

    about = examine()
    versions = about["versions"]
    lines = [
        f"{about['processor']['model']}, {config.threads} thread(s), Python {versions['python']}, torch {versions['torch']}, "
        f"transformers {about['packages']['transformers']}, farlight {versions['farlight']}; `python examples/stream.py`",
        "",
        "| tokens so far | keys kept per layer | cache, MiB | process, MiB | ms per token |",
        "|---|---|---|---|---|",
    ]
    picked = [line for line in sparse if line["tokens"] in (config.every, 2 * config.every)]
    picked += [line for line in sparse if line["tokens"] % (config.tokens // 5) == 0]
    for line in picked:
        lines.append(
            f"| {line['tokens']:,} | {line['kept']:,} | {line['cache_bytes'] / 2**20:.1f} | "
            f"{line['resident_bytes'] / 2**20:.0f} | {line['milliseconds']:.2f} |"
        )
    lines += ["", "Full attention with transformers' default cache, and the stream at its end, timed alternately:", ""]
    lines.append(
        "| tokens in the default cache | its MiB | ms per token | ms per token of the stream | ratio |\n|---|---|---|---|---|"
    )
    for x in dense:
        times = f"{x['milliseconds']:.2f} | {x['milliseconds_of_the_stream']:.2f}"
        ratio = x["milliseconds"] / x["milliseconds_of_the_stream"]
        lines.append(f"| {x['tokens']:,} | {x['cache_bytes'] / 2**20:.1f} | {times} | {ratio:.1f} |")
    return "\n".join(lines) + "\n"


def draw(sparse: list[dict[str, float]], dense: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    sparse_tokens, dense_tokens = [x["tokens"] for x in sparse], [x["tokens"] for x in dense]
    left.plot(sparse_tokens, [x["cache_bytes"] / 2**20 for x in sparse], label="SparseCache")
    left.plot(
        sparse_tokens, [x["resident_bytes"] / 2**20 for x in sparse], color="C1", label="the whole process, with SparseCache"
    )
    left.plot(
        dense_tokens, [x["cache_bytes"] / 2**20 for x in dense], "o--", color="C2", label="transformers' cache, full attention"
    )
    left.set(xlabel="tokens so far", ylabel="MiB")
    right.plot(sparse_tokens, [x["milliseconds"] for x in sparse], label="SparseCache")
    # The baseline may have run under another load, so it is plotted by its ratio to the stream timed beside it.
    stream_ms = statistics.median(x["milliseconds"] for x in sparse)
    scaled = [stream_ms * x["milliseconds"] / x["milliseconds_of_the_stream"] for x in dense]
    right.plot(dense_tokens, scaled, "o--", color="C2", label="transformers' cache, full attention (by ratio)")
    right.set(xlabel="tokens so far", ylabel="ms per token (median)")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, some seconds")
    parser.add_argument("--out", type=Path, default=Path("stream-out"), help="folder for the records, the figure and the table")
    for name in ("tokens", "window", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int)
    options = vars(parser.parse_args(arguments))
    config, out = SMOKE if options.pop("smoke") else Config(), options.pop("out")
    config = replace(config, **{name: value for name, value in options.items() if value is not None})
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    (out / "stream-config.json").write_text(json.dumps(asdict(config)))
    sparse = stream(config, out)
    dense = compare_dynamic_cache(config, out)
    (out / "stream.md").write_text(table(sparse, dense, config), encoding="utf-8")
    draw(sparse, dense, out / "stream.png")
    print(table(sparse, dense, config))


if __name__ == "__main__":
    main()
