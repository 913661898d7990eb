"""Healing: a language model distilled, by its own full attention, to work under a sparse one.

    python examples/heal_smollm2.py --text war-and-peace.txt --out heal

The teacher is the model with full attention. The student starts as the same weights under a pattern, router or fit; LoRA
adapters (peft) or all weights (`--all-weights`) are trained to minimise

    KL(teacher's predictions ‖ student's)  +  hidden · mean of ‖student's state - teacher's‖² / ‖teacher's‖²

(over layers and tokens) on the first half of each text. Judged is the next-token loss of the second half of passages of the
second half, which may be longer (`--judged-tokens`). `--truth` adds that much of the text's own next-token loss. Full attention
(`causal()`) is healed beside the patterns: what it gains comes from the text. Without `--truth` it has nothing to learn.
`--bfloat16` trains in mixed precision, in half the time where the processor multiplies bfloat16 (AVX512-BF16, AMX).

Runs resume: OUT/PATTERN/state.pt holds weights, optimizer, step and curve; a step depends on these, its number and the seed
alone. OUT/heal.md is the table of all runs in OUT, OUT/heal.png their curves, OUT/PATTERN/curve.jsonl the numbers, with
`--save` OUT/PATTERN/model the healed model, for `farlight audit`. Needs farlight[examples] and the model of `make demo-lm`.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import farlight as fl
from farlight.analysis.candidates_by_layer import pattern_for, subjects
from farlight.analysis.loss.language import LanguageReader, paired_interval
from farlight.analysis.passages import cut_passages
from farlight.cli.inputs import read_subjects, read_text
from farlight.hf import sparsify, use_pattern
from farlight.hf.layers import attention_layers
from farlight.hf.loading import load_model
from farlight.hf.setting import Observation

FULL = "causal()"
SINKS = "seen_by_all([0, 1, 2, 3])"
PATTERNS = (
    f"window(45, 0) | {SINKS}",
    f'topblocks(share=0.06, block=4, query_block=16, causal=True, score="softmax") | window(16, 0) | {SINKS}',
    FULL,
)
# Rows whose logits are formed at a time: all of them would take tokens · vocabulary numbers, several times over.
LOGIT_ROWS = 128
MEASURED = ("step", "seconds", "curve", "full", "losses")  # what a stored run holds beside weights and optimizer
NUMBERS = (
    ("tokens", 1024, "tokens of a passage"),
    ("steps", 200, "steps of the optimizer"),
    ("batch", 1, "passages of a step"),
    ("rank", 16, "rank of LoRA"),
    ("hidden", 1.0, "weight of the distance of hidden states"),
    ("truth", 0.0, "weight of the text's own next-token loss"),
    ("seed", 0, "of the adapters and of the order of passages"),
    ("judged", 4, "held-out passages of each text"),
    ("judged-tokens", 0, "tokens of a held-out passage; 0: as many as of the others"),
    ("judge-every", 50, "steps between judgements"),
    ("store-every", 20, "steps between stored states"),
    ("seconds", float("inf"), "stop after this; the next run goes on"),
)


@dataclass(frozen=True)
class Recipe:
    """All that the course of a run depends on, beside the model and the texts. rank: of LoRA; 0: all weights are trained."""

    pattern: str
    tokens: int
    steps: int
    batch: int
    rank: int
    rate: float
    hidden: float
    truth: float
    seed: int
    bfloat16: bool = False

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up over a twentieth of them, then a line down to a tenth."""
        warm = max(1, self.steps // 20)
        return self.rate * min((step + 1) / warm, 1 - 0.9 * max(0, step - warm) / max(1, self.steps - warm))

    def places(self, step: int, count: int) -> list[int]:
        """The passages of a step out of `count`, which are shuffled for each epoch."""
        epochs = [divmod(index, count) for index in range(step * self.batch, (step + 1) * self.batch)]
        seeds = [torch.Generator().manual_seed(self.seed + 1000 * epoch) for epoch, _ in epochs]
        return [int(torch.randperm(count, generator=seed)[place]) for seed, (_, place) in zip(seeds, epochs, strict=True)]


def read_passages(files: list[Path | None], tokenizer: Any, tokens: int, judged: int, longer: int) -> tuple[Tensor, Tensor]:
    """Ids of all of the first halves, `(passages, tokens)`, and of `judged` passages of `longer` tokens of each second half."""
    learned, held_out = [], []
    for name, text in map(read_text, files):
        first, second = text[: len(text) // 2], text[len(text) // 2 :]
        learned.append(cut_passages(first, tokenizer, tokens, None).ids)
        held_out.append(cut_passages(second, tokenizer, longer, judged, spread=True).ids)
        if learned[-1].shape[1] < tokens or held_out[-1].shape[1] < longer:
            raise SystemExit(f"{name}: half of it is shorter than {max(tokens, longer)} tokens; name a longer text or less.")
    return torch.cat(learned), torch.cat(held_out)


class Student:
    """A copy of the teacher under a recipe's pattern; `weights` are what is trained."""

    def __init__(self, teacher: Any, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.model = copy.deepcopy(teacher)
        self._adapters: Any = None
        if recipe.rank:
            from peft import LoraConfig, LoraModel

            # Puts the adapters into the model itself and leaves it a language model of its own class.
            config = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear")
            self._adapters = LoraModel(self.model, config, "default")
        else:
            self.model.requires_grad_(True)
        self.model.eval()
        self.weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.subject = subjects(read_subjects([recipe.pattern]))[0]
        sparsify(self.model, self.subject.chosen)

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write the whole model, adapters added to its weights; the student cannot be trained any more."""
        model = self.model if self._adapters is None else self._adapters.merge_and_unload()
        # The weights are no longer those of a 4-bit file.
        vars(model.config).pop("quantization_config", None)
        model.save_pretrained(folder, state_dict=dict(model.state_dict()))
        tokenizer.save_pretrained(folder)


def backward(student: Any, teacher: Any, ids: Tensor, recipe: Recipe) -> dict[str, float]:
    """Add the gradients of one passage `(1, N)`, divided by the batch. Returns what each part of the loss is."""
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16)
    with mixed:
        got, goal = (model.base_model(ids, output_hidden_states=True, use_cache=False) for model in (student, teacher))
    x, y = (torch.stack(states.hidden_states[1:]) for states in (got, goal))
    distance = ((x - y).square().sum(-1) / y.square().sum(-1)).mean()
    # The loss of the predictions goes back to the last states some rows at a time, and from there in one pass with the rest.
    last, n = got.last_hidden_state.detach().requires_grad_(), ids.shape[1]
    heads = [(student.get_output_embeddings(), last), (teacher.get_output_embeddings(), goal.last_hidden_state)]
    divergence = truth = 0.0
    for first in range(0, n, LOGIT_ROWS):
        rows = slice(first, first + LOGIT_ROWS)
        with mixed:
            logits = [head(states[0, rows]) for head, states in heads]
        # The eight bits of bfloat16 are too few for the difference of two log-probabilities.
        log_p, goal_log_p = (values.float().log_softmax(-1) for values in logits)
        kl = functional.kl_div(log_p, goal_log_p, reduction="sum", log_target=True) / n
        following = ids[0, first + 1 : first + 1 + LOGIT_ROWS]
        nll = functional.nll_loss(log_p[: len(following)], following, reduction="sum") / (n - 1)
        ((kl + recipe.truth * nll) / recipe.batch).backward()
        divergence, truth = divergence + kl.item(), truth + nll.item()
    torch.autograd.backward([recipe.hidden * distance / recipe.batch, got.last_hidden_state], [None, last.grad])
    return {"kl": divergence, "hidden": distance.item(), "truth": truth}


@torch.no_grad()
def check_head(model: Any) -> None:
    """End unless the logits are the head's output on the last states: `backward` forms them some rows at a time."""
    output = model(torch.zeros(1, 2, dtype=torch.int64), output_hidden_states=True, use_cache=False)
    if not torch.allclose(model.get_output_embeddings()(output.hidden_states[-1]), output.logits, rtol=1e-3, atol=1e-3):
        raise SystemExit(f"{type(model).__name__} scales or caps its logits, which is not served here; use a Llama-like model.")


@torch.no_grad()
def judge(model: Any, passages: Tensor) -> list[float]:
    """The loss of each passage, nats per token of its second half."""
    read = LanguageReader(model)
    return [float(loss.double().mean()) for ids in passages if (loss := read(ids[None])[1]) is not None]


@torch.no_grad()
def links_kept(student: Student, ids: Tensor) -> float:
    """Links as a share of those of full attention on one passage `(1, N)`, mean over layers and heads."""
    calls: list[Observation] = []
    with use_pattern(student.model, student.subject.chosen, observer=calls.append):
        student.model.base_model(ids, use_cache=False)
    n, heads, pairs = ids.shape[1], calls[0].q.shape[1], 0
    for number, call in zip(attention_layers(student.model), calls, strict=True):
        chosen = pattern_for(student.subject.at(number), call.q, call.k)
        pairs += fl.plan(call.own if chosen is None else chosen & call.own, n, heads=heads).pairs
    return pairs / sum(heads * call.own.count(n) for call in calls)


class Run:
    """One recipe in one folder: the student, its optimizer, the step it is at, and what was measured so far."""

    def __init__(self, folder: Path, recipe: Recipe, teacher: Any, learned: Tensor, judged: Tensor) -> None:
        self.folder, self.recipe, self.teacher, self.learned, self.judged = folder, recipe, teacher, learned, judged
        self.student = Student(teacher, recipe)
        # The gradients of full attention are rounding errors, since teacher and student agree; the default eps would let Adam
        # scale them up to whole steps.
        self.optimizer = torch.optim.AdamW(self.student.weights.values(), lr=recipe.rate, eps=1e-6, weight_decay=0.0)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.full: list[float] = []
        self.losses: dict[int, list[float]] = {}
        self.about = asdict(recipe) | {"texts": [zlib.crc32(ids.numpy().tobytes()) for ids in (learned, judged)]}
        if (folder / "state.pt").exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.folder / "state.pt")
        if state["about"] != self.about:
            other = ", ".join(f"{key} {value}" for key, value in state["about"].items() if value != self.about[key])
            raise SystemExit(f"{self.folder} holds a run of another recipe ({other}); go on with that, or name another --out.")
        with torch.no_grad():
            for name, weight in self.student.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self).update({name: state[name] for name in MEASURED})

    def store(self) -> None:
        """Write the state, whole or not at all, and the curve as lines of JSON."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"about": self.about, "weights": self.student.weights, "optimizer": self.optimizer.state_dict()}
        state |= {name: vars(self)[name] for name in MEASURED}
        torch.save(state, self.folder / "state.part")
        (self.folder / "state.part").replace(self.folder / "state.pt")
        (self.folder / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.curve), "utf-8")

    def train(self, end: float, store_every: int, judge_every: int) -> bool:
        """All steps that are missing, at least one; False where the time `end` came before the last."""
        if not self.full:
            self.full = judge(self.teacher, self.judged)
            self._record({"step": 0}, True)
        is_over = False
        while self.step < self.recipe.steps and not is_over:
            begin = time.monotonic()
            line = self._step()
            self.seconds += time.monotonic() - begin
            is_last, is_over = self.step == self.recipe.steps, time.monotonic() > end
            self._record(line, is_last or self.step % judge_every == 0)
            if is_last or is_over or self.step % store_every == 0:
                self.store()
        return self.step == self.recipe.steps

    def _step(self) -> dict[str, float]:
        """One step of the optimizer; the line of the curve."""
        rate = self.optimizer.param_groups[0]["lr"] = self.recipe.rate_at(self.step)
        self.optimizer.zero_grad()
        places = self.recipe.places(self.step, len(self.learned))
        parts = [backward(self.student.model, self.teacher, self.learned[place][None], self.recipe) for place in places]
        torch.nn.utils.clip_grad_norm_(self.student.weights.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        return {"step": self.step, "rate": rate} | {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}

    def _record(self, line: dict[str, float], with_judgement: bool) -> None:
        """Add a line to the curve and print it."""
        if with_judgement:
            self.losses[self.step] = judge(self.student.model, self.judged)
            lost = [after - full for after, full in zip(self.losses[self.step], self.full, strict=True)]
            line = line | {"lost": sum(lost) / len(lost)}
        self.curve.append(line)
        print(" ".join(f"{name} {value:.5g}" for name, value in line.items()), flush=True)

    def result(self) -> dict[str, Any]:
        """What the table says of the run; JSON-serialisable."""
        measured = {"minutes": self.seconds / 60, "curve": self.curve, "links": links_kept(self.student, self.judged[:1])}
        return {"about": self.about, "full": self.full, "before": self.losses[0], "after": self.losses[self.step]} | measured


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table: nats lost against full attention before training, with 95 % intervals over passages."""

    def cell(ends: Sequence[float], starts: Sequence[float]) -> str:
        differences = [end - start for end, start in zip(ends, starts, strict=True)]
        mean, interval = sum(differences) / len(differences), paired_interval(differences)
        return f"{mean:+.4f}" + ("" if interval is None else f" ({interval[0]:+.4f} … {interval[1]:+.4f})")

    rows = ["| attention | links | lost before | lost after | after, to full attention healed so | minutes |", "|" + "---|" * 6]
    for result in results:
        beside = [each["after"] for each in results if each["about"] == result["about"] | {"pattern": FULL}]
        cells = [f"`{result['about']['pattern']}`".replace("|", "\\|"), f"{result['links']:.1%}"]
        cells += [cell(result[name], result["full"]) for name in ("before", "after")]
        cells += [cell(result["after"], beside[0]) if beside else "", f"{result['minutes']:.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: the divergence that is trained, and the nats lost on held-out text, by step."""
    from matplotlib.figure import Figure

    panels = (figure := Figure(figsize=(10, 4), layout="constrained")).subplots(1, 2)
    for result in results:
        name = f"{result['about']['pattern'].partition('(')[0]}, {result['links']:.0%} of the links"
        for panel, key in zip(panels, ("kl", "lost"), strict=True):
            points = [(line["step"], line[key]) for line in result["curve"] if key in line]
            panel.plot(*zip(*points, strict=True), label=name, marker="o" if key == "lost" else "")
    panels[0].set(xlabel="step", ylabel="KL(teacher ‖ student), nats per token", title="trained on")
    panels[1].set(xlabel="step", ylabel="nats per token lost to full attention", title="held-out text")
    panels[1].legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a causal language model: smollm2, a folder, or a name of the hub")
    parser.add_argument("--pattern", action="append", help=f"or a file of a fit; repeatable. Default: {', '.join(PATTERNS)}")
    parser.add_argument("--text", type=Path, nargs="+", default=[None], help="text files; default: Python's manual")
    parser.add_argument("--out", type=Path, default=Path("heal"))
    parser.add_argument("--all-weights", action="store_true", help="train all weights instead of adapters")
    parser.add_argument("--rate", type=float, help="learning rate; default: 1e-3 of LoRA, 1e-4 of all weights")
    for name, default, text in NUMBERS:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text}; default: {default}")
    parser.add_argument("--bfloat16", action="store_true", help="round what matrix products and attention of a step read")
    parser.add_argument("--save", action="store_true", help="write the healed models")
    args = parser.parse_args(arguments)
    if min(args.tokens, args.steps, args.batch, args.rank, args.judged) < 1:
        parser.error("--tokens, --steps, --batch, --rank and --judged are at least 1.")
    end = time.monotonic() + args.seconds
    loaded = load_model(args.model)
    teacher = loaded.model.requires_grad_(False)
    check_head(teacher)
    learned, judged = read_passages(args.text, loaded.tokenizer, args.tokens, args.judged, args.judged_tokens or args.tokens)
    args.rank, args.rate = (0, args.rate or 1e-4) if args.all_weights else (args.rank, args.rate or 1e-3)
    for pattern in args.pattern or PATTERNS:
        print(f"{pattern}: {len(learned)} passages to learn from, {len(judged)} to judge on", flush=True)
        recipe = Recipe(pattern, **{field.name: getattr(args, field.name) for field in fields(Recipe)[1:]})
        # Patterns of the same words are told apart by a checksum, fits by that of their file.
        content = Path(pattern).read_bytes() if pattern.endswith(".json") else pattern.encode()
        folder = re.sub(r"\W+", "-", pattern).strip("-")[:40] + f"-{zlib.crc32(content):08x}"
        run = Run(args.out / folder, recipe, teacher, learned, judged)
        if not run.train(end, args.store_every, args.judge_every):
            print(f"stopped after step {run.step} of {recipe.steps}; run again to go on")
            return
        (run.folder / "result.json").write_text(json.dumps(run.result()), "utf-8")
        if args.save:
            run.student.save(run.folder / "model", loaded.tokenizer)
        del run  # before the next student is made
    results = [json.loads(path.read_text("utf-8")) for path in sorted(args.out.glob("*/result.json"))]
    (args.out / "heal.md").write_text(table(results), "utf-8")
    draw(results, args.out / "heal.png")
    print(table(results))


if __name__ == "__main__":
    main()
