"""Write docs/patterns.md from the docstrings of the patterns and presets, so that there is one text of each.

`python scripts/write_docs.py` writes it, `python scripts/write_docs.py --check` says whether it is what the code says.
"""

# ruff: noqa: E501 (rows of Markdown tables)

import inspect
import sys
from pathlib import Path

import farlight as fl
from farlight.patterns import CONSTRUCTORS

TARGET = Path(__file__).parent.parent / "docs" / "patterns.md"

HEAD = r"""# Patterns

Written from the docstrings by `python scripts/write_docs.py`; edit those.

A pattern is a set of allowed (query, key) pairs: a value, combined with `|` (union), `&` (intersection), `-` (difference)
and `~` (complement). i is the position of a query, j that of a key. The same expressions, without `fl.`, are read from text by
`fl.parse`, by the command line and from JSON; they are parsed, never evaluated.

## Limits

What exceeds a limit is refused with a `PatternError` (in planning a `PlanError`) before memory is taken for it.

| limit | of | raised by |
|---|---|---|
| 256 MiB | tables, lists and ranges spelled in a text or JSON, all together | `fl.parse(text, limit=…)`, `fl.Pattern.from_json(text, limit=…)`: bytes, or None for any number |
| 4,000,000 characters | an expression | JSON, which keeps tables apart |
| 2^20 entries | a list of lengths, distances or positions | a tensor in its place: ids, a mask. A range of tokens, all counted from one end, is kept as a range |
| 200 | depth of nested expressions; `a \| b \| c` is not deep | |
| 1024 | parts joined by one sign | one part that names many: `offsets([…])` |
| 2^34 | evaluations of single pairs, where neither intervals nor sorting serve (`~strided(2)` on 2^18 tokens) | a window around it |
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
    presets = [section(name, "fl.presets.", getattr(fl.presets, name)) for name in fl.presets.__all__]
    return "\n\n".join([HEAD.strip(), "## Primitives", *primitives, "## Presets", *presets]) + "\n"


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
