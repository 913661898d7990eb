"""Long-range recall: a name is given on the first page and asked for on the last.

A text of thousands of tokens is filler, but for one name near its beginning and questions after it, each far outside the
reach of the windows. A model of two layers is trained from nothing to answer with the name. What it may look at decides:

    window                  the name is out of reach: chance
    window + lighthouse     token 0 sees everything and is seen by everyone: it carries the name over
    window + rooms          KMeans routing in the last layer: question and name learn to meet in one room (in the shortest
                            texts, with which training begins, that layer reads everything while its rooms form)
    full                    every pair, for comparison

    python examples/recall.py                      # 4096 tokens; some minutes on two cores
    python examples/recall.py --smoke              # 192 tokens, seconds: does it run?

Writes the curves and a table to --out.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import farlight as fl
from farlight.routing import KMeans

ASK, LIGHTHOUSE, FIRST_NAME = 0, 1, 2


@dataclass(frozen=True)
class Config:
    tokens: int = 4096
    names: int = 16
    fillers: int = 48
    page: int = 128  # the name stands somewhere on the first page, or the first quarter of a short text
    questions: int = 16  # at most; the last token is one of them
    window: int = 8
    rooms: int = 8
    whole: int = 64  # texts up to this length are read whole while rooms are learned: what never meets is never drawn together
    width: int = 64
    heads: int = 4
    layers: int = 2
    batch: int = 2  # texts of full length in a step; as many tokens in texts that are shorter
    steps: int = 800
    first: int = 64  # tokens of the first texts
    warm: float = 0.6  # the full length comes after this part of the steps at the latest
    rate: float = 3e-3
    judged: int = 100  # fresh texts that the table is made from
    seconds: float = 200.0  # for each pattern, at most
    threads: int = 2
    seed: int = 0

    @property
    def words(self) -> int:
        return FIRST_NAME + self.names + self.fillers

    @property
    def lengths(self) -> list[int]:
        out = [self.first]
        while out[-1] < self.tokens:
            out.append(min(2 * out[-1], self.tokens))
        return out


SMOKE = Config(
    tokens=192, names=8, fillers=24, page=32, window=2, rooms=4, whole=32, batch=8, steps=240, first=32, seconds=10.0, threads=1
)


def texts(config: Config, tokens: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(text `(count, tokens)`, name `(count,)`, places of the questions): no question is near the name or another one."""
    filler = torch.randint(config.fillers, (count, tokens), generator=generator) + FIRST_NAME + config.names
    name = torch.randint(config.names, (count,), generator=generator)
    page = min(config.page, tokens // 4)
    place = torch.randint(1, page, (count,), generator=generator)
    filler[:, 0] = LIGHTHOUSE
    filler[torch.arange(count), place] = FIRST_NAME + name
    reach = 2 * config.layers * config.window  # twice as far as windows can hand anything on
    asked = torch.arange(tokens - 1, min(page + reach, tokens - 2), -max(reach, tokens // config.questions))
    filler[:, asked] = ASK
    return filler, name, asked


class Layer(nn.Module):
    """One layer: attention over a pattern that may be chosen by a router, then a small feed-forward network."""

    def __init__(self, config: Config, routed: bool, fixed: fl.Pattern) -> None:
        super().__init__()
        width, self.heads, self.fixed, self.whole = config.width, config.heads, fixed, config.whole
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.router = (
            KMeans(config.heads, width // config.heads, config.rooms, decay=0.95, seed=config.seed) if routed else None
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_a(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        pattern = self.fixed if self.router is None else self.router(q, k) | self.fixed
        if self.router is not None and self.training and x.shape[1] <= self.whole:
            pattern = fl.full()
        x = x + self.out(fl.attention(q, k, v, pattern).transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.mlp(self.norm_b(x))
        return mixed


class Reader(nn.Module):
    """Tokens to names. No positions: the answer does not depend on where things stand."""

    def __init__(self, config: Config, routed: bool, fixed: fl.Pattern) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.words, config.width)
        self.layers = nn.Sequential(
            *(Layer(config, routed and layer + 1 == config.layers, fixed) for layer in range(config.layers))
        )
        self.read = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.names))

    def forward(self, text: Tensor, asked: Tensor) -> Tensor:
        answers: Tensor = self.read(self.layers(self.embed(text))[:, asked])
        return answers


@dataclass
class Result:
    name: str
    steps: list[int]
    accuracy: list[float]
    final: float  # at the last token of fresh texts of full length
    longer: float  # the same on texts twice as long as any seen in training
    seconds: float
    density: float


def chances(config: Config) -> dict[str, Callable[[], Reader]]:
    near = fl.window(config.window)
    return {
        "window": lambda: Reader(config, False, near),
        "window + lighthouse": lambda: Reader(config, False, near | fl.global_tokens([0])),
        "window + rooms": lambda: Reader(config, True, near),
        "full": lambda: Reader(config, False, fl.full()),
    }


@torch.no_grad()
def judge(model: Reader, config: Config, tokens: int, count: int) -> float:
    """The share of fresh texts whose question at the very end is answered."""
    model.eval()
    generator = torch.Generator().manual_seed(config.seed + 10**6)
    right = 0
    for _ in range(-(-count // config.batch)):
        text, name, _ = texts(config, tokens, config.batch, generator)
        right += int((model(text, torch.tensor([tokens - 1]))[:, 0].argmax(-1) == name).sum())
    model.train()
    return right / (-(-count // config.batch) * config.batch)


@torch.no_grad()
def density(model: Reader, config: Config) -> float:
    """Links of the last layer as a share of all."""
    layer = model.layers[-1]
    assert isinstance(layer, Layer)
    if layer.router is None:
        return layer.fixed.density(config.tokens)
    model.eval()
    text = texts(config, config.tokens, 1, torch.Generator().manual_seed(config.seed))[0]
    q, k, _ = (
        layer.qkv(layer.norm_a(model.layers[:-1](model.embed(text)))).unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    )
    pattern: fl.Pattern = layer.router(q, k) | layer.fixed
    model.train()
    return pattern.density(config.tokens, heads=config.heads)


def train(name: str, make: Callable[[], Reader], config: Config, log: Callable[[str], None]) -> Result:
    torch.manual_seed(config.seed)
    model = make()
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), config.rate, weight_decay=0.01)
    steps, accuracy, begin = [], [], time.perf_counter()
    stage, entered = 0, 0
    for step in range(config.steps):
        # Short texts first: what is learned there holds at any length, and the name stands out more. Texts grow once they are
        # read well, or when their time is over.
        recent = accuracy[max(entered, step - 10) :]
        done = min(1.0, max(step / config.steps, (time.perf_counter() - begin) / config.seconds))
        for group in optimizer.param_groups:
            group["lr"] = config.rate * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * done))
        due = int(len(config.lengths) * (2 * done / config.warm - 1))  # the shortest texts may take half of the time to grow
        if stage + 1 < len(config.lengths) and (stage < due or (len(recent) == 10 and sum(recent) / 10 > 0.95)):
            stage, entered = stage + 1, step
        tokens = config.lengths[stage]
        text, names, asked = texts(config, tokens, config.batch * config.tokens // tokens, generator)
        logits = model(text, asked)
        answers = names[:, None].expand(-1, asked.numel())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps.append(step + 1)
        accuracy.append(float((logits.argmax(-1) == answers).float().mean()))
        if (step + 1) % max(1, config.steps // 10) == 0:
            log(
                f"{name:20s} step {step + 1:5d}  {tokens:6d} tokens  loss {loss.item():.3f}  "
                f"right {sum(accuracy[-20:]) / len(accuracy[-20:]):.3f}"
            )
        if time.perf_counter() - begin > config.seconds:
            log(f"{name:20s} stopped after {step + 1} steps: {config.seconds:g} s are over")
            break
    seconds = time.perf_counter() - begin
    final, longer = (judge(model, config, tokens, config.judged) for tokens in (config.tokens, 2 * config.tokens))
    return Result(name, steps, accuracy, final, longer, seconds, density(model, config))


def table(results: list[Result], config: Config) -> str:
    lines = [
        f"Recall over {config.tokens} tokens: {config.layers} layers, width {config.width}, {config.heads} heads, windows of "
        f"{config.window} on each side, {config.names} names (chance {1 / config.names:.1%}), seed {config.seed}, "
        f"{config.threads} threads, torch {torch.__version__}.",
        "",
        "| pattern | right, at the last token | the same, text twice as long | links, last layer | steps | training |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(f"| {r.name} | {r.final:.1%} | {r.longer:.1%} | {r.density:.2%} | {r.steps[-1]} | {r.seconds:.0f} s |")
    return "\n".join(lines) + "\n"


def draw(results: list[Result], config: Config, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for r in results:
        smooth = [
            sum(r.accuracy[max(0, s - 20) : s + 1]) / len(r.accuracy[max(0, s - 20) : s + 1]) for s in range(len(r.accuracy))
        ]
        axes.plot(r.steps, smooth, label=f"{r.name} ({r.density:.1%} of the links)")
    axes.axhline(1 / config.names, color="grey", linestyle=":", label="chance")
    axes.set(
        xlabel="step",
        ylabel="questions answered",
        ylim=(0, 1.02),
        title=f"A name from page 1, asked for up to {config.tokens} tokens later",
    )
    axes.legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny text, some seconds")
    parser.add_argument("--out", type=Path, default=Path("recall-out"), help="where the picture and the table go")
    parser.add_argument("--only", action="append", help="train only this pattern (may be repeated)")
    for name in ("tokens", "steps", "warm", "batch", "window", "rooms", "width", "judged", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seconds", type=float, help="for each pattern, at most")
    given = vars(parser.parse_args(arguments))
    config = SMOKE if given.pop("smoke") else Config()
    out, only = given.pop("out"), given.pop("only")
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    torch.set_num_threads(config.threads)
    wanted = {name: make for name, make in chances(config).items() if not only or name in only}
    if not wanted:
        parser.error(f"--only {only}: choose from {', '.join(chances(config))}")
    results = [train(name, make, config, lambda line: print(line, flush=True)) for name, make in wanted.items()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "recall.md").write_text(table(results, config), encoding="utf-8")
    draw(results, config, out / "recall.png")
    print(table(results, config))
    return results


if __name__ == "__main__":
    main()
