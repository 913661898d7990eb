"""Every code block of README, README.zh-CN and docs runs as pasted: a page's blocks in order, beside a book and models.

The models have the names of the hub, so that nothing of a block is replaced: small ones lie under these names in the folder.
Commands are read by the command line; blocks of `>>>` are doctests.
"""

from __future__ import annotations

import doctest
import importlib
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from test_audit import tokenizer, words
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LongformerConfig, LongformerModel

from farlight.cli import _app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")])
# Pages in Chinese and the English pages of the same code.
TRANSLATED = {page: page.with_name(page.name.replace(".zh.md", ".md")) for page in PAGES if page.name.endswith(".zh.md")}
TRANSLATED[ROOT / "README.zh-CN.md"] = ROOT / "README.md"
# Translations have the code of their originals (below), patterns.md that of docstrings, which are doctests; fits take a minute.
SLOW = {"decoding.md", "fit.md", "patterns.md", *(page.name for page in TRANSLATED)}
# Parts of a program that torchrun starts on several ranks, which has the model and the tensors: read, not run.
FRAGMENTS = {"distributed.md"}
LLAMA, MINILM, LONGFORMER = (
    *("meta-llama/Llama-3.2-1B", "sentence-transformers/all-MiniLM-L6-v2", "allenai/longformer-base-4096"),
)


def blocks(page: Path, language: str = "python") -> list[str]:
    """The blocks whose language matches. All are found in order, so that no end of a block is read as a beginning."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [code for name, code in fenced if re.fullmatch(language, name)]


def name_of(page: Path) -> str:
    return page.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: a book, and models under their names."""
    root = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"vocab_size": 50, "max_position_embeddings": 512}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    models = {
        LLAMA: LlamaForCausalLM(LlamaConfig(**sizes, **special)),
        MINILM: BertModel(BertConfig(**sizes)),
        LONGFORMER: LongformerModel(LongformerConfig(**sizes, attention_window=[8, 8])),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer(longest=512).save_pretrained(root / name)
    (root / "book.txt").write_text(" . ".join(["CHAPTER I", words(900), "CHAPTER II", words(1400)]), encoding="utf-8")
    return root


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in SLOW else [])
        for page in PAGES
        if blocks(page) and page.name not in FRAGMENTS
    ],
    ids=name_of,
)
def test_every_block_of_a_page_runs_as_pasted(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "sentence_transformers" in page.read_text(encoding="utf-8"):
        pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {"__name__": "pasted"}
    for number, code in enumerate(blocks(page), 1):
        title = f"{page.name}, block {number}"
        if code.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code, names, title, str(page), 0)
            assert doctest.DocTestRunner(verbose=False).run(test, clear_globs=False).failed == 0, capsys.readouterr().out
            names = test.globs
        else:
            exec(compile(code, title, "exec"), names)
    assert set(names) > {"__name__"}


@pytest.mark.parametrize("name", sorted(FRAGMENTS))
def test_fragments_are_python(name: str) -> None:
    for code in blocks(ROOT / "docs" / name):
        compile(code, name, "exec")


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks that call farlight."""
    lines = [line for block in blocks(page, "(?:|sh|bash|console)") for line in block.replace("\\\n", " ").splitlines()]
    return [line.partition("#")[0].rpartition("|" if line.startswith("cat") else "\0")[2].strip() for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_page_is_one(page: Path) -> None:
    """Command and options exist, values have their types."""
    group = typer.main.get_command(_app())
    for line in commands(page):
        if not line.startswith("farlight "):
            continue
        name, *arguments = shlex.split(line)[1:]
        command = group.get_command(None, name)  # type: ignore[attr-defined, arg-type]
        assert command is not None, line
        command.make_context(name, [word for word in arguments if word != "…"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_pattern_of_a_command_is_one(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of farlight's commands and of scripts: a pattern, a router, or a file of the repository."""
    from farlight.cli.inputs import read_subjects

    monkeypatch.chdir(ROOT)
    lines = [line for block in blocks(page, "(?:|sh|bash|console)") for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        if "--pattern" in line:
            pairs = itertools.pairwise(shlex.split(line, comments=True))
            read_subjects([value for name, value in pairs if name == "--pattern"])


def test_patterns_md_is_what_the_docstrings_say() -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "write_docs.py"), "--check"], check=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


@pytest.mark.parametrize("page", sorted(TRANSLATED), ids=name_of)
def test_a_translation_has_the_code_of_its_original(page: Path) -> None:
    """Comments and queries apart, what is pasted from one is what is pasted from the other."""

    def code(source: Path, language: str) -> list[str]:
        lines = "\n".join(blocks(source, language)).splitlines()
        return [re.sub('--query "[^"]+"', "--query …", line.partition("#")[0]).rstrip() for line in lines]

    for language in ("python", "sh"):
        assert code(page, language) == code(TRANSLATED[page], language)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "site"))
    return importlib.import_module("reference")


def test_the_site_has_every_page(reference: Any) -> None:
    """The navigation names each page of docs/ once; translations follow their originals."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {page.name for page in PAGES if page.parent.name == "docs" and page not in TRANSLATED}
    pages |= {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    pages |= {f"api/{name}.md" for name in reference.GROUPS}
    assert sorted(re.findall(r"([\w/-]+\.md)", navigation)) == sorted({"index.md", "api/index.md", *pages})


def test_the_reference_has_every_public_name(reference: Any, tmp_path: Path) -> None:
    reference.write(tmp_path)
    assert "fl.attention" in (tmp_path / "api" / "index.md").read_text(encoding="utf-8")
