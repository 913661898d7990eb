"""The API reference: a page per group of public names, whose text mkdocstrings takes from the docstrings.

Every public name has its place: a name of `farlight.__all__` that no group names ends the build.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import farlight as fl
from farlight.patterns import CONSTRUCTORS, CONVERTERS

# Page -> (title, names of `farlight`, or one of its modules, whose public names follow).
GROUPS: dict[str, tuple[str, list[str]]] = {
    "patterns": ("Patterns", ["Pattern", "parse", *CONSTRUCTORS, *CONVERTERS, "prefix_lm", "presets"]),
    "attention": ("Attention and plans", ["attention", "packed_attention", "merge", "explain", "Explanation", "plan", "Plan"]),
    "score": ("Terms on the scores", ["score"]),
    "routing": ("Routers: content decides", ["routing"]),
    "analysis": (
        "What is lost, how far information travels",
        ["retention", "Retention", "fit", "Fit", "evaluate", "smallworld", "SmallWorld", "path", "Path", "reach", "Reach"],
    ),
    "decoding": ("Decoding", ["KVCache", "decode", "step"]),
    "nn": ("Layers", ["nn"]),
    "hf": ("Hugging Face models", ["hf"]),
    "distributed": ("Attention over ranks", ["distributed"]),
    "embedding": ("Documents as vectors", ["embedding"]),
    "errors": (
        "Errors",
        ["FarlightError", "ArgumentError", "PatternError", "PlanError", "UnsupportedError", "DistributedError"],
    ),
}


def write(pages: Path) -> None:
    """Write api/*.md. Raises ValueError for a public name without a group."""
    names = [name for _, group in GROUPS.values() for name in group]
    if missing := sorted(set(fl.__all__) - set(names)):
        raise ValueError(f"the API reference has no group for {', '.join(missing)}: add them to GROUPS")
    folder = pages / "api"
    folder.mkdir()
    rows = []
    for page, (title, group) in GROUPS.items():
        entries = [entry for name in group for entry in entries_of(name)]
        body = "\n\n".join(block(shown, value) for shown, value in entries)
        (folder / f"{page}.md").write_text(f"# {title}\n\n{body}\n", encoding="utf-8")
        links = ", ".join(f"[`{shown}`]({page}.md#{path_of(value)})" for shown, value in entries)
        rows.append(f"| [{title}]({page}.md) | {links} |")
    head = "# API reference\n\n`import farlight as fl`. Written from the docstrings.\n\n| | |\n|---|---|\n"
    (folder / "index.md").write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


def entries_of(name: str) -> list[tuple[str, Any]]:
    """(spelling, object) of a public name, or of all public names of a module."""
    value = getattr(fl, name)
    if not isinstance(value, ModuleType):
        return [(f"fl.{name}", value)]
    # `dir` also has the names that need an optional package.
    public = dir(value) if "__dir__" in vars(value) else value.__all__
    entries = [(f"fl.{name}.{each}", getattr(value, each)) for each in public]
    return [(shown, each) for shown, each in entries if inspect.isclass(each) or inspect.isfunction(each)]


def path_of(value: Any) -> str:
    """Where a class or function is defined."""
    return f"{value.__module__}.{value.__qualname__}"


def block(shown: str, value: Any) -> str:
    """The entry of one name, with the spelling that users write as its heading."""
    return f"::: {path_of(value)}\n    options:\n      heading: {shown}\n      toc_label: {shown}"
