"""examples/train_over_ranks.py under torchrun: a killed rank, a restart, the losses of a run without interruption."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]


def trained(book: Path, out: Path, *options: str) -> str:
    """The losses of each step, as written. The run must end by itself, without an error."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", "2"]
    sizes = ["--steps", "8", "--length", "512", "--width", "32", "--every", "3"]
    command = [*torchrun, str(ROOT / "examples/train_over_ranks.py"), str(book), "--out", str(out), *sizes, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-6000:]
    assert ("ends: " in done.stderr) == ("--kill" in options)
    return (out / "loss.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--data-parallel", "2"], ["--fsdp", "--data-parallel", "2"]])
def test_a_killed_rank_changes_no_loss(tmp_path: Path, options: list[str]) -> None:
    book = tmp_path / "book.txt"
    book.write_bytes(b"".join(b"Line %d of a book that counts its lines.\n" % number for number in range(500)))
    whole = trained(book, tmp_path / "whole", *options)
    assert whole.count("\n") == 8
    assert trained(book, tmp_path / "killed", "--kill", "5", *options) == whole
    assert (tmp_path / "killed" / "killed").exists()
