"""Write the pages of the documentation site into build/docs/pages: `python scripts/site/assemble.py`; then `mkdocs build`.

The start page is README; docs/*.md are copied; the gallery, the commands' options, the API reference and the notebooks with
their results are made here from the package itself. A page of another language has its code before the suffix: choosing.zh.md.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import commands
import gallery
import notebooks
import reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "build" / "docs" / "pages"
README = {"README.md": "index.md", "README.zh-CN.md": "index.zh.md"}
# Kinds of files of docs/ that the site shows or offers.
SUFFIXES = {".md", ".png", ".svg", ".css", ".ipynb"}

_LINK = re.compile(r"(!?\[(?:[^\]\[]|\[[^\]]*\])*\])\(([^)\s]+)\)")


def site_links(text: str, source: Path) -> str:
    """The page's links from a file of the repository to those of the site; a file that the site lacks stays as its name."""

    def target(match: re.Match[str]) -> str:
        label, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match[0]
        path, mark, anchor = link.partition("#")
        place = (source.parent / path).resolve()
        if place.name in README and place.parent == ROOT:
            site = "index.md"
        elif place.is_relative_to(ROOT / "docs") and place.exists():
            # The site's languages share one name of a page, and a notebook is a page.
            site = place.relative_to(ROOT / "docs").as_posix().replace(".zh.md", ".md").replace(".ipynb", ".md")
        else:
            return f"{label[1:-1]} (`{place.relative_to(ROOT).as_posix()}`)"
        return f"{label}({site}{mark}{anchor})"

    return _LINK.sub(target, text)


def copy_pages() -> None:
    for source in sorted((ROOT / "docs").rglob("*")):
        if source.suffix not in SUFFIXES:
            continue
        place = PAGES / source.relative_to(ROOT / "docs")
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            place.write_text(site_links(source.read_text(encoding="utf-8"), source), encoding="utf-8")
        else:
            shutil.copy(source, place)
    for name, page in README.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        (PAGES / page).write_text(site_links(text, ROOT / name), encoding="utf-8")


def main() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    copy_pages()
    gallery.write(PAGES)
    commands.write(PAGES)
    reference.write(PAGES)
    notebooks.write(PAGES)


if __name__ == "__main__":
    main()
