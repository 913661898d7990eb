"""The documents that are written from the code say what the code says, and the README's snippet runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_patterns_md_is_what_the_docstrings_say():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "write_docs.py"), "--check"], check=True)


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_first_snippet_runs(name, capsys):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    code = snippets[0].replace("16_384, 64", "512, 16")
    assert "512, 16" in code
    exec(compile(code, name, "exec"), {})
    assert "auto takes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), f"{name} links to {target}, which does not exist"


def test_the_snippets_of_building_run():
    """In order, as one program, on a text of 256 tokens."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "building.md").read_text(encoding="utf-8"), re.DOTALL))
    for long, short in (("[1000, 3096]", "[100, 156]"), ("[4096], [3000]", "[256], [200]"), ("4096", "256"), ("(6, ", "(2, ")):
        assert long in code
        code = code.replace(long, short)
    held = {}
    exec(compile(code, "building.md", "exec"), held)
    assert held["logits"].shape == (1, 1024, 256)
    assert held["states"].shape == (2, 256, 256)
