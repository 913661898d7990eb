"""Generate docs/patterns.md from the docstrings of the primitives and presets.

`python scripts/write_docs.py` writes the page; with `--check` it exits with 1 where the page differs from the docstrings.
"""

# ruff: noqa: E501 (rows of Markdown tables)

import inspect
import sys
from pathlib import Path

import farlight as fl
from farlight.patterns import CONSTRUCTORS, CONVERTERS

TARGET = Path(__file__).parent.parent / "docs" / "patterns.md"

HEAD = r"""# Patterns

Written from the docstrings by `python scripts/write_docs.py`; edit those.

A pattern is an immutable set of allowed (query, key) pairs, for every batch item and head. Patterns are combined with `|`
(union), `&` (intersection), `-` (difference) and `~` (complement). Below, i is the position of a query, j that of a key, b the
batch item, h the head. The same expressions, without `fl.`, are read from text by `fl.parse`, by the command line and from
JSON; they are parsed, never evaluated.

## Limits

An expression beyond a limit is refused with a `PatternError` (in planning a `PlanError`) before its memory is allocated.

| limit | quantity | way around it |
|---|---|---|
| 256 MiB | tables, lists and ranges written in a text or JSON, in total | `fl.parse(text, limit=…)`, `fl.Pattern.from_json(text, limit=…)`: bytes, or None for no limit |
| 4,000,000 characters | an expression | JSON, which stores tables separately |
| 2^20 entries | a list of lengths, distances or positions | a tensor instead: ids, a mask. A range of positions that all count from one end stays a range |
| 200 | depth of nested expressions; `a \| b \| c` is one level | |
| 1024 | parts of one `\|`, `&` or `per_head` | one primitive with many values: `offsets([…])` |
| 2^34 | pairs evaluated one by one, where neither key intervals nor sorting by labels apply (`~strided(2)` on 2^18 tokens) | intersect with a window |
"""


def section(name: str, prefix: str, value: object) -> str:
    signature = str(inspect.signature(value)).split(" -> ")[0]
    for noise in ("'", "self, "):
        signature = signature.replace(noise, "")
    text, example = [], []
    for line in inspect.getdoc(value).splitlines():
        (example if line.startswith((">>>", "...")) or example else text).append(line)
    out = [f"### `{prefix}{name}{signature}`", "", "\n".join(text).strip()]
    if example:
        out += ["", "```python", "\n".join(example).strip(), "```"]
    return "\n".join(out)


def document() -> str:
    primitives = [section(name, "fl.", getattr(fl, name)) for name in CONSTRUCTORS]
    converters = [section(name, "fl.", getattr(fl, name)) for name in CONVERTERS]
    presets = [section(name, "fl.presets.", getattr(fl.presets, name)) for name in fl.presets.__all__]
    return (
        "\n\n".join(
            [HEAD.strip(), "## Primitives", *primitives, "## Patterns of what others have", *converters, "## Presets", *presets]
        )
        + "\n"
    )


def main() -> int:
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") != document():
            print(f"{TARGET.name} is not what the docstrings say; run python scripts/write_docs.py", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(document(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
