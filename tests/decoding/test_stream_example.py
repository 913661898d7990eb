"""examples/stream.py runs, resumes where it stopped, and writes its record, table and figure."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
EXAMPLE = Path(__file__).parents[2] / "examples" / "stream.py"


def test_the_stream_runs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("stream", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["stream"] = example  # dataclasses look their module up
    spec.loader.exec_module(example)
    example.main(["--smoke", "--tokens", "100", "--out", str(tmp_path)])
    example.main(["--smoke", "--tokens", "200", "--out", str(tmp_path)])
    lines = json.loads((tmp_path / "stream.json").read_text())
    assert [line["tokens"] for line in lines] == [50, 100, 150, 200]
    assert [line["kept"] for line in lines] == [50, 68, 68, 68]
    assert lines[-1]["cache_bytes"] == lines[1]["cache_bytes"]
    assert "| 200 | 68 |" in (tmp_path / "stream.md").read_text()
    assert (tmp_path / "stream.png").stat().st_size > 10_000
    assert "keys kept per layer" in capsys.readouterr().out
