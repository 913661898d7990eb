"""What pyproject.toml requires: any Triton that a supported torch pins, and no package that its extra does not name."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import farlight

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
LINUX = {"platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}

# The Triton that each release of torch for CUDA requires on Linux.
PINNED = {
    "2.9.0": "3.5.0", "2.10.0": "3.6.0", "2.11.0": "3.6.0", "2.12.0": "3.7.0",
    "2.13.0": "3.7.1", "2.14.0": "3.8.0", "2.15.0": "3.9.0",
}  # fmt: skip


def brought(extra: str) -> list[Requirement]:
    """The requirements of an extra, those of the extras that it names included."""
    out = []
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        if requirement.name == "farlight":
            for name in sorted(requirement.extras):
                out += brought(name)
        else:
            out.append(requirement)
    return out


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


@pytest.mark.parametrize("extra", ["triton", "all", "test"])
@pytest.mark.parametrize("torch", PINNED)
def test_the_triton_of_every_supported_torch_is_taken(torch: str, extra: str) -> None:
    (required,) = (requirement for requirement in map(Requirement, PROJECT["dependencies"]) if requirement.name == "torch")
    assert required.specifier.contains(torch)
    (triton,) = (requirement for requirement in brought(extra) if requirement.name == "triton")
    assert triton.marker is not None
    assert triton.marker.evaluate(LINUX)
    assert triton.specifier.contains(PINNED[torch])


def test_the_triton_of_the_installed_torch_is_taken() -> None:
    (ours,) = (requirement for requirement in brought("test") if requirement.name == "triton")
    for text in importlib.metadata.requires("torch") or ():
        theirs = Requirement(text)
        if theirs.name == "triton" and (theirs.marker is None or theirs.marker.evaluate({"extra": ""})):
            assert ours.specifier.contains(importlib.metadata.version("triton"))
            assert theirs.specifier.contains(importlib.metadata.version("triton"))


@pytest.mark.parametrize("system, machine", [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "riscv64")])
def test_no_triton_is_asked_for_where_none_is_published(system: str, machine: str) -> None:
    place = {"platform_system": system, "platform_machine": machine, "extra": ""}
    for requirement in brought("all"):
        if requirement.name == "triton":
            assert requirement.marker is not None
            assert not requirement.marker.evaluate(place)


def test_all_is_every_feature() -> None:
    assert names(brought("all")) == {"typer", "rich", "transformers", "matplotlib", "scipy", "triton"}
    assert names(brought("cli")) == {"typer", "rich"}
    assert names(brought("all")) | names(brought("demo")) < names(brought("test"))
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == {"torch", "numpy"}


def test_every_import_is_named() -> None:
    """A third-party module that the package imports, lazily or not, is a dependency or in an extra."""
    source = Path(farlight.__file__).parent
    roots = set()
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add(str(node.module).split(".")[0])
    named = {Requirement(text).name for text in PROJECT["dependencies"]} | names(brought("test")) | names(brought("sentence"))
    assert {canonicalize_name(root) for root in roots - sys.stdlib_module_names - {"farlight"}} <= named


def test_continuous_integration_runs_the_suite_everywhere() -> None:
    flow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    for words in ("ubuntu-latest", "macos-latest", "windows-latest", "make lint", "make test", "pytest"):
        assert words in flow


def test_a_tag_publishes_every_wheel() -> None:
    flow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8")
    for words in ('tags: ["v*"]', "cibuildwheel", "--sdist", "needs: [wheels, sdist]", "gh-action-pypi-publish"):
        assert words in flow
    assert PROJECT["urls"]["Homepage"].startswith("https://")
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
