"""The rules of the source that a newcomer relies on: one idea a file, short functions, one meaning a name, docstrings."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import farlight as fl

SOURCE = Path(fl.__file__).parent
ROOT = Path(__file__).parents[2]
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
LONGEST_FILE, LONGEST_FUNCTION = 350, 60
# A fused kernel holds its accumulators in registers from its first line to its last: it is one function.
LONGEST_GPU_KERNEL = 80


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring and its signature."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return (node.end_lineno or node.lineno) - body[0].lineno + 1


def limit_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    is_gpu_kernel = any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
    return LONGEST_GPU_KERNEL if is_gpu_kernel else LONGEST_FUNCTION


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    assert {f.name: lines_of(f) for f in functions(TREES[path]) if lines_of(f) > limit_of(f)} == {}


def test_native_files_are_short() -> None:
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")]
    long = {path.name: lines_in(path) for path in files if lines_in(path) > LONGEST_FILE}
    assert long == {}


def lines_in(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_two_classes_share_a_name() -> None:
    names = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_public_functions_and_classes_have_docstrings() -> None:
    missing = [
        f"{name_of(path)}: {node.name}"
        for path, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
        # Overloads are types of the function that follows them.
        if not any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)
    ]
    assert missing == []
