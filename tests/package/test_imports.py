"""What importing farlight loads, and in which direction its packages may import one another.

errors, caching, measurements  <-  patterns  <-  plan  <-  kernels  <-  ops, merge, attention  <-  everything else
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import farlight as fl

SOURCE = Path(fl.__file__).parent
OPTIONAL = [
    "transformers",
    "matplotlib",
    "typer",
    "rich",
    "triton",
    "hypothesis",
    "networkx",
    "scipy",
    "pytest",
    "tokenizers",
    "huggingface_hub",
]


def fresh(code: str) -> str:
    """What a new Python process prints."""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout.strip()


PREAMBLE = f"import sys; sys.path[:0] = [{str(SOURCE.parent)!r}]\n"


def test_a_cold_import_loads_torch_and_numpy_only() -> None:
    code = PREAMBLE + (
        "import torch, numpy\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import farlight\n"
        "new = {name.split('.')[0] for name in sys.modules} - before - sys.stdlib_module_names - {'farlight'}\n"
        f"print(sorted(new), sorted({{name.split('.')[0] for name in sys.modules}} & set({OPTIONAL!r})))"
    )
    assert fresh(code) == "[] []"


def test_it_works_where_nothing_optional_is_installed() -> None:
    code = PREAMBLE + (
        f"for name in {OPTIONAL!r}: sys.modules[name] = None\n"
        "import torch, farlight as fl, farlight.testing\n"
        "q = torch.randn(1, 2, 40, 8, requires_grad=True)\n"
        "p = fl.window(3) | fl.global_tokens([0]) | fl.random_keys(2)\n"
        "for backend in ('auto', 'torch', 'dense', 'reference'): fl.attention(q, q, q, p, backend=backend).sum().backward()\n"
        "fl.explain(q, q, q, p); fl.plan(p, 100).dense(); fl.retention(q, q, p)\n"
        "fl.parse(repr(p)); fl.Pattern.from_json(p.to_json())\n"
        "farlight.testing.solve(farlight.testing.CASES[0], farlight.testing.inputs(farlight.testing.CASES[0]))\n"
        "print('works')"
    )
    assert fresh(code) == "works"


def test_only_the_command_line_imports_typer_and_rich() -> None:
    """Lazy imports included: whatever is called outside `farlight.cli`, neither package is needed."""
    users = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.split(".")[0] in ("typer", "rich")
    }
    assert users
    assert {package(module) for module in users} == {"cli"}


def test_a_missing_package_is_named_when_it_is_asked_for() -> None:
    code = PREAMBLE + (
        "sys.modules['matplotlib'] = None\n"
        "import farlight as fl\n"
        "try:\n    fl.window(3).plot(10)\n"
        "except fl.UnsupportedError as error:\n    print(error)\n"
    )
    found = fresh(code)
    assert found.startswith("a picture needs matplotlib (")
    assert found.endswith("); pip install 'farlight[plot]'.")


# ---- the direction of imports -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Import:
    """`module` imports `target`; lazily when inside a function."""

    module: str
    target: str
    lazy: bool
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}{' lazily' if self.lazy else ''}"


MODULES = {
    ".".join(("farlight", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def imports(module: str, path: Path) -> Iterator[Import]:
    """The farlight modules that a file imports, those for type checking left out."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            inside = lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.Import):
                yield from (
                    Import(module, name.name, lazy, child.lineno)
                    for name in child.names
                    if name.name.split(".")[0] == "farlight"
                )
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno}: relative import"
                if (child.module or "").split(".")[0] == "farlight":
                    for name in child.names:
                        whole = f"{child.module}.{name.name}"
                        real = whole in MODULES or name.name == "_cpu"  # the compiled module has no source here
                        yield Import(module, whole if real else str(child.module), lazy, child.lineno)
            else:
                yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), False)


IMPORTS = [found for module, path in MODULES.items() for found in imports(module, path)]

# A package may import those of a smaller number, and its own.
LAYERS = {
    "_version": 0,
    "errors": 0, "caching": 0, "ragged": 0, "inputs": 0.5, "dispatcher": 0.6, "measurements": 0, "_cpu": 0,
    "patterns": 1,
    "score": 2,
    "plan": 3,
    "kernels": 4,
    "batching": 4.5, "flops": 4.5, "derivatives": 4.6, "ops": 5, "score_operators": 5.5, "merge": 5,
    "requests": 5.9, "packed": 5.9, "attention": 6, "varlen": 6.5, "explanation": 6, "planning": 6,
    "testing": 7, "routing": 7, "distributed": 7.5, "decoding": 7.5,
    "hf": 8, "nn": 8,
    "analysis": 9,
    "report": 10, "embedding": 10,
    "cli": 11, "__main__": 12,
}  # fmt: skip

# Functions that reach up when they are called, each with its reason.
REACHING_UP = {
    ("farlight.patterns.expression", "farlight.kernels.counting"): "Pattern.count is counted as it is planned",
    ("farlight.patterns.expression", "farlight.analysis.plot"): "Pattern.plot draws",
    ("farlight.patterns.expression", "farlight.analysis.notebook"): "a notebook shows the matrix",
    ("farlight.kernels.calibrate", "farlight"): "the file of measured rates carries the version",
    ("farlight.analysis.cost", "farlight"): "times the public attention",
    ("farlight.hf", "farlight.analysis.fit.whole_model"): "fl.hf.fit is analysis under its public name",
    ("farlight.cli.doctor", "farlight"): "prints the version",
}


def package(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_packages_import_in_one_direction() -> None:
    wrong = []
    for found in IMPORTS:
        source, target = package(found.module), package(found.target)
        if source in ("", target) or (found.lazy and (found.module, found.target) in REACHING_UP):
            continue
        assert source in LAYERS, f"{found.module}: give the package a place in LAYERS"
        if found.target == "farlight":
            # The public face may be imported whole by what stands above everything.
            if LAYERS[source] < 8 and found.target == "farlight":
                wrong.append(str(found))
            continue
        if LAYERS.get(target, 99) >= LAYERS[source] and not (found.lazy and LAYERS[source] == 11):
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_the_list_of_exceptions_is_used() -> None:
    lazy = {(found.module, found.target) for found in IMPORTS if found.lazy}
    assert set(REACHING_UP) <= lazy, f"no longer imported: {set(REACHING_UP) - lazy}"


BACKENDS = {"torch_tiled", "cpu", "dense", "reference", "triton"}


def test_backends_never_import_each_other() -> None:
    wrong = []
    for found in IMPORTS:
        source, target = found.module.split("."), found.target.split(".")
        if source[:2] == ["farlight", "kernels"] and len(source) > 2 and source[2] in BACKENDS:
            other = (
                len(target) > 2
                and target[:2] == ["farlight", "kernels"]
                and target[2] not in (source[2], "backend", "checks", "sinks")
            )
            if other or target == ["farlight", "kernels"]:
                wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_no_kernel_sees_a_pattern_but_by_its_plan() -> None:
    """Kernels may know sizes, hashes and requests; what is allowed they read from the plan."""
    known = {"farlight.patterns.hashing", "farlight.patterns.expression"}
    wrong = [
        str(found)
        for found in IMPORTS
        if found.module.startswith(tuple(f"farlight.kernels.{name}" for name in BACKENDS))
        and found.target.startswith("farlight.patterns")
        and found.target not in known
    ]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_module_of_odds_and_ends() -> None:
    assert not [name for name in MODULES if name.split(".")[-1] in ("utils", "util", "helpers", "misc", "common_utils")]


@pytest.mark.parametrize("module", MODULES)
def test_a_file_says_why_it_exists(module: str) -> None:
    lines = MODULES[module].read_text().splitlines()
    document = ast.get_docstring(ast.parse("\n".join(lines)))
    assert document, f"{module} does not say why it exists"


def test_all_of_a_package_is_imported_without_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """`from farlight.hf import *`: no name of an `__all__` needs more than torch and numpy."""
    for name in ("transformers", "sentence_transformers", "networkx", "scipy", "matplotlib", "typer", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith(("farlight.hf.cache", "farlight.embedding.sentence_module"))]:
        monkeypatch.delitem(sys.modules, name)
    for module in [fl, *(value for value in vars(fl).values() if isinstance(value, ModuleType))]:
        exec(f"from {module.__name__} import *", {})
    assert not {"SparseCache", "SparseTransformer"} & {*dir(fl.hf), *dir(fl.embedding)}


def test_optional_names_are_listed_where_their_package_is_installed() -> None:
    optional = {"SparseCache": (fl.hf, "transformers"), "SparseTransformer": (fl.embedding, "sentence_transformers")}
    for name, (module, needs) in optional.items():
        assert (name in dir(module)) == (find_spec(needs) is not None)


def test_what_is_exported_exists() -> None:
    for name in fl.__all__:
        assert getattr(fl, name) is not None
    assert sorted(fl.__all__) == list(fl.__all__)
    for module in MODULES:
        if module.rsplit(".", 1)[-1].startswith("__main__") or module.startswith("farlight.cli"):
            continue
        loaded = __import__(module, fromlist=["__all__"])
        for name in getattr(loaded, "__all__", ()):
            assert hasattr(loaded, name), f"{module}.{name}"
