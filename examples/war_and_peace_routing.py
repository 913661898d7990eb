"""Bits per byte on a long novel under three patterns: full attention, windows, windows united with KMeans clusters.

A small causal byte model is trained once per pattern on the same text, in the same order, for the same number of steps, with
the same parameters (routing adds none: centroids are moving averages). The table gives each pattern's loss and cost. "Rooms" is
the founding article's word for clusters.

    python examples/war_and_peace_routing.py war-and-peace.txt             # minutes on two cores
    python examples/war_and_peace_routing.py war-and-peace.txt --smoke     # seconds: a smoke test

Writes loss curves and a table to --out.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import farlight as fl
from farlight.routing import KMeans


@dataclass(frozen=True)
class Config:
    tokens: int = 2048
    batch: int = 2
    steps: int = 300
    width: int = 128
    heads: int = 4
    layers: int = 4
    window: int = 64  # bytes to the left
    rooms: int = 16  # clusters of KMeans in each head
    per_room: int = 128  # a query sees this many most recent keys of its cluster
    rate: float = 2e-3
    judged: int = 32_768  # held-out bytes, at the end of the text
    device: str = "cpu"
    threads: int = 2
    seed: int = 0


SMOKE = Config(tokens=128, batch=2, steps=8, width=32, heads=2, layers=2, window=8, rooms=4, per_room=8, judged=512, threads=1)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of x `(…, N, D)` at positions `(N,)`. Su et al. 2021, arXiv:2104.09864."""
    half = x.shape[-1] // 2
    angle = positions[:, None] / 10_000 ** (torch.arange(half, device=x.device) / half)
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()), -1)


class Layer(nn.Module):
    def __init__(self, config: Config, fixed: fl.Pattern, routed: bool) -> None:
        super().__init__()
        width, self.heads, self.fixed = config.width, config.heads, fixed
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.router = None
        if routed:
            dim = width // config.heads
            self.router = KMeans(config.heads, dim, config.rooms, per_cluster=config.per_room, causal=True, decay=0.99)

    def pattern(self, q: Tensor, k: Tensor) -> fl.Pattern:
        """Clusters depend on content only: q and k before the rotary embedding."""
        return self.fixed if self.router is None else self.router(q, k) | self.fixed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_a(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        pattern, positions = self.pattern(q, k), torch.arange(x.shape[1], device=x.device)
        q, k = rotated(q, positions), rotated(k, positions)
        x = x + self.out(fl.attention(q, k, v, pattern).transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.mlp(self.norm_b(x))
        return mixed


class Model(nn.Module):
    def __init__(self, config: Config, fixed: fl.Pattern, routed: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, config.width)
        self.layers = nn.Sequential(*(Layer(config, fixed, routed) for _ in range(config.layers)))
        self.read = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, 256))
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "mlp.2.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, text: Tensor) -> Tensor:
        logits: Tensor = self.read(self.layers(self.embed(text)))
        return logits


@dataclass
class Result:
    name: str
    bits: float
    curve: list[float]
    density: float
    step_seconds: float
    parameters: int


def variants(config: Config) -> dict[str, Callable[[], Model]]:
    local = fl.window(config.window, 0)
    return {
        "full": lambda: Model(config, fl.causal(), False),
        "window": lambda: Model(config, local, False),
        "window + rooms": lambda: Model(config, local, True),
    }


def bits(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)


@torch.no_grad()
def evaluate(model: Model, text: Tensor, config: Config) -> float:
    """Bits per byte of held-out text: windows of `tokens` bytes at half-window strides, of which the second half is scored,
    so that every scored byte has at least half of the context.
    """
    model.eval()
    half, total, count = config.tokens // 2, 0.0, 0
    for start in range(0, text.numel() - config.tokens - 1, half):
        piece = text[start : start + config.tokens + 1].to(config.device)
        logits = model(piece[None, :-1])[:, half:]
        total += bits(logits, piece[None, 1 + half :]).item() * (config.tokens - half)
        count += config.tokens - half
    model.train()
    return total / max(1, count)


@torch.no_grad()
def density(model: Model, text: Tensor, config: Config) -> float:
    """Links as a share of the causal ones, mean over layers, on one window of text."""
    model.eval()
    x, shares = model.embed(text[None, : config.tokens].to(config.device)), []
    for layer in model.layers:
        assert isinstance(layer, Layer)
        q, k, _ = layer.qkv(layer.norm_a(x)).unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
        links = layer.pattern(q, k).count(config.tokens, heads=config.heads)
        shares.append(links / (config.heads * config.tokens * (config.tokens + 1) // 2))
        x = layer(x)
    model.train()
    return sum(shares) / len(shares)


def train(name: str, make: Callable[[], Model], text: Tensor, config: Config, log: Callable[[str], None]) -> Result:
    torch.manual_seed(config.seed)
    model = make().to(config.device)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), config.rate, betas=(0.9, 0.95), weight_decay=0.1)
    train_text, held_out = text[: -config.judged], text[-config.judged :]
    curve, train_seconds = [], 0.0
    for step in range(config.steps):
        starts = torch.randint(train_text.numel() - config.tokens - 1, (config.batch,), generator=generator)
        pieces = torch.stack([train_text[s : s + config.tokens + 1] for s in starts.tolist()]).to(config.device)
        for group in optimizer.param_groups:
            group["lr"] = config.rate * min(1.0, (step + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * step / config.steps))
        begin = time.perf_counter()
        loss = bits(model(pieces[:, :-1]), pieces[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(loss.item())
        train_seconds += time.perf_counter() - begin
        if (step + 1) % max(1, config.steps // 10) == 0:
            recent = curve[-20:]
            mean, pace = sum(recent) / len(recent), train_seconds / (step + 1)
            log(f"{name:16s} step {step + 1:5d}  {mean:.3f} bits per byte  {pace:.3f} s a step")
    parameters = sum(p.numel() for p in model.parameters())
    return Result(
        name,
        evaluate(model, held_out, config),
        curve,
        density(model, held_out, config),
        train_seconds / config.steps,
        parameters,
    )


def table(results: Sequence[Result], config: Config, source: Path) -> str:
    c = config
    lines = [
        f"{source.name}: {c.tokens} bytes of context, {c.layers} layers of width {c.width} with {c.heads} heads, "
        f"{c.steps} steps of {c.batch * c.tokens} bytes, the last {c.judged} bytes held out; window {c.window}, "
        f"{c.rooms} rooms of {c.per_room}; "
        f"{c.device}, {c.threads} threads, torch {torch.__version__}, seed {c.seed}.",
        "",
        "| pattern | bits per byte, held out | links, of the causal ones | seconds a step | parameters |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(f"| {r.name} | {r.bits:.3f} | {r.density:.1%} | {r.step_seconds:.3f} | {r.parameters:,} |")
    return "\n".join(lines) + "\n"


def draw(results: Sequence[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for r in results:
        smooth = [sum(r.curve[max(0, s - 20) : s + 1]) / len(r.curve[max(0, s - 20) : s + 1]) for s in range(len(r.curve))]
        axes.plot(range(1, len(smooth) + 1), smooth, label=f"{r.name} ({r.density:.0%} of the causal links)")
    axes.set(xlabel="step", ylabel="bits per byte, training")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a long text, such as War and Peace in UTF-8")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, some seconds")
    parser.add_argument("--out", type=Path, default=Path("war-and-peace-out"), help="folder for the figure and the table")
    parser.add_argument("--device", help="cpu or cuda")
    for name in (
        "tokens",
        "batch",
        "steps",
        "width",
        "heads",
        "layers",
        "window",
        "rooms",
        "per_room",
        "judged",
        "threads",
        "seed",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    options = vars(parser.parse_args(arguments))
    config, source, out = SMOKE if options.pop("smoke") else Config(), options.pop("text"), options.pop("out")
    config = replace(config, **{name: value for name, value in options.items() if value is not None})
    torch.set_num_threads(config.threads)
    text = torch.frombuffer(bytearray(source.read_bytes()), dtype=torch.uint8).long()
    needed = config.judged + config.tokens + 2
    if text.numel() < needed or config.judged < config.tokens + 2:
        parser.error(f"{source} has {text.numel()} bytes; at least {needed} are needed, and --judged above --tokens")
    results = [train(name, make, text, config, lambda line: print(line, flush=True)) for name, make in variants(config).items()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "bits-per-byte.md").write_text(table(results, config, source), encoding="utf-8")
    draw(results, out / "bits-per-byte.png")
    print(table(results, config, source))
    return results


if __name__ == "__main__":
    main()
