"""Long-range recall: a synthetic task in which the answer is thousands of tokens before the question.

A text is filler tokens, one name near its beginning, and question tokens after it, each outside the receptive field of the
windows. A model of two layers is trained from random weights to output the name at each question, under four patterns:

    window                  the name is out of reach: chance accuracy
    window + lighthouse     a global token (token 0) sees all tokens and is seen by all: a path of two links
    window + rooms          KMeans routing in the last layer: question and name learn to share a cluster; in the shortest texts,
                            with which training begins, that layer has full attention while its centroids form
    full                    every pair, the baseline

    python examples/recall.py                      # 4096 tokens; some minutes on two cores
    python examples/recall.py --smoke              # 192 tokens, seconds: a smoke test

Writes accuracy curves and a table to --out.
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
    page: int = 128  # the name is among the first `page` tokens, or in the first quarter of a shorter text
    questions: int = 16  # per text, at most; the last token is one of them
    window: int = 8
    rooms: int = 8  # clusters of KMeans
    # Training texts up to this length get full attention in the routed layer: tokens in different clusters have no gradient
    # towards each other.
    whole: int = 64
    width: int = 64
    heads: int = 4
    layers: int = 2
    batch: int = 2  # texts of full length in a step; the same number of tokens in shorter texts
    steps: int = 800
    first: int = 64  # tokens of the first texts
    warm: float = 0.6  # the full length is reached after this share of the steps at the latest
    rate: float = 3e-3
    judged: int = 100  # texts, unseen in training, that the table is computed from
    seconds: float = 200.0  # training time for each pattern, at most
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
    """(text `(count, tokens)`, name `(count,)`, positions of the questions `(m,)`), all int64.

    Questions are further from the name and from each other than the windows of all layers reach together.
    """
    filler = torch.randint(config.fillers, (count, tokens), generator=generator) + FIRST_NAME + config.names
    name = torch.randint(config.names, (count,), generator=generator)
    page = min(config.page, tokens // 4)
    name_position = torch.randint(1, page, (count,), generator=generator)
    filler[:, 0] = LIGHTHOUSE
    filler[torch.arange(count), name_position] = FIRST_NAME + name
    reach = 2 * config.layers * config.window  # twice the receptive field of the windows
    question_positions = torch.arange(tokens - 1, min(page + reach, tokens - 2), -max(reach, tokens // config.questions))
    filler[:, question_positions] = ASK
    return filler, name, question_positions


class Layer(nn.Module):
    """A transformer layer: attention over `fixed`, united with a router's pattern if `routed`, then a feed-forward network."""

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
    """Token ids to logits over names. No position encoding: the answer does not depend on positions."""

    def __init__(self, config: Config, routed: bool, fixed: fl.Pattern) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.words, config.width)
        self.layers = nn.Sequential(
            *(Layer(config, routed and layer + 1 == config.layers, fixed) for layer in range(config.layers))
        )
        self.read = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.names))

    def forward(self, text: Tensor, question_positions: Tensor) -> Tensor:
        answers: Tensor = self.read(self.layers(self.embed(text))[:, question_positions])
        return answers


@dataclass
class Result:
    name: str
    steps: list[int]
    accuracy: list[float]
    final: float  # accuracy at the last token of unseen texts of full length
    longer: float  # the same on texts twice as long as any in training
    seconds: float
    density: float


def variants(config: Config) -> dict[str, Callable[[], Reader]]:
    local = fl.window(config.window)
    return {
        "window": lambda: Reader(config, False, local),
        "window + lighthouse": lambda: Reader(config, False, local | fl.global_tokens([0])),
        "window + rooms": lambda: Reader(config, True, local),
        "full": lambda: Reader(config, False, fl.full()),
    }


@torch.no_grad()
def evaluate(model: Reader, config: Config, tokens: int, count: int) -> float:
    """Accuracy at the last token, over `count` texts unseen in training, rounded up to whole batches."""
    model.eval()
    generator = torch.Generator().manual_seed(config.seed + 10**6)
    num_correct = 0
    for _ in range(-(-count // config.batch)):
        text, name, _ = texts(config, tokens, config.batch, generator)
        num_correct += int((model(text, torch.tensor([tokens - 1]))[:, 0].argmax(-1) == name).sum())
    model.train()
    return num_correct / (-(-count // config.batch) * config.batch)


@torch.no_grad()
def density(model: Reader, config: Config) -> float:
    """Links of the last layer as a share of all pairs, on one text."""
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
        # Curriculum: the length doubles once the mean accuracy of ten steps exceeds 95 %, or when the stage's time is over.
        # Without positions, what is learned on short texts holds on long ones.
        recent = accuracy[max(entered, step - 10) :]
        done = min(1.0, max(step / config.steps, (time.perf_counter() - begin) / config.seconds))
        for group in optimizer.param_groups:
            group["lr"] = config.rate * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * done))
        due = int(len(config.lengths) * (2 * done / config.warm - 1))  # the shortest texts get half of the warm-up
        if stage + 1 < len(config.lengths) and (stage < due or (len(recent) == 10 and sum(recent) / 10 > 0.95)):
            stage, entered = stage + 1, step
        tokens = config.lengths[stage]
        text, names, question_positions = texts(config, tokens, config.batch * config.tokens // tokens, generator)
        logits = model(text, question_positions)
        answers = names[:, None].expand(-1, question_positions.numel())
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
                f"accuracy {sum(accuracy[-20:]) / len(accuracy[-20:]):.3f}"
            )
        if time.perf_counter() - begin > config.seconds:
            log(f"{name:20s} stopped after {step + 1} steps: {config.seconds:g} s are over")
            break
    seconds = time.perf_counter() - begin
    final, longer = (evaluate(model, config, tokens, config.judged) for tokens in (config.tokens, 2 * config.tokens))
    return Result(name, steps, accuracy, final, longer, seconds, density(model, config))


def table(results: list[Result], config: Config) -> str:
    lines = [
        f"Recall over {config.tokens} tokens: {config.layers} layers, width {config.width}, {config.heads} heads, windows of "
        f"{config.window} on each side, {config.names} names (chance {1 / config.names:.1%}), seed {config.seed}, "
        f"{config.threads} threads, torch {torch.__version__}.",
        "",
        "| pattern | accuracy, last token | the same, text twice as long | links, last layer | steps | training |",
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
        title=f"Recall of a name over up to {config.tokens} tokens",
    )
    axes.legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny texts, some seconds")
    parser.add_argument("--out", type=Path, default=Path("recall-out"), help="folder for the figure and the table")
    parser.add_argument("--only", action="append", help="train only this pattern (may be repeated)")
    for name in ("tokens", "steps", "warm", "batch", "window", "rooms", "width", "judged", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seconds", type=float, help="for each pattern, at most")
    options = vars(parser.parse_args(arguments))
    config = SMOKE if options.pop("smoke") else Config()
    out, only = options.pop("out"), options.pop("only")
    config = replace(config, **{name: value for name, value in options.items() if value is not None})
    torch.set_num_threads(config.threads)
    selected = {name: make for name, make in variants(config).items() if not only or name in only}
    if not selected:
        parser.error(f"--only {only}: choose from {', '.join(variants(config))}")
    results = [train(name, make, config, lambda line: print(line, flush=True)) for name, make in selected.items()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "recall.md").write_text(table(results, config), encoding="utf-8")
    draw(results, config, out / "recall.png")
    print(table(results, config))
    return results


if __name__ == "__main__":
    main()
