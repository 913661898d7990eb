"""The examples run: a few steps on tiny texts, with the table and the picture written."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_recall(tmp_path: Path) -> None:
    recall = load("recall")
    few = [
        "--smoke",
        "--tokens",
        "64",
        "--batch",
        "2",
        "--steps",
        "3",
        "--width",
        "16",
        "--judged",
        "4",
        "--out",
        str(tmp_path),
    ]
    results = recall.main(few)
    assert [r.name for r in results] == ["window", "window + lighthouse", "window + rooms", "full"]
    assert all(0 <= r.final <= 1 and len(r.accuracy) == 3 for r in results)
    assert results[0].density < results[1].density < results[2].density < results[3].density == 1
    assert (tmp_path / "recall.png").stat().st_size > 1000
    assert (tmp_path / "recall.md").read_text(encoding="utf-8").count("\n|") == 6


def test_no_question_is_within_reach_of_the_name() -> None:
    recall = load("recall")
    for config in (recall.SMOKE, recall.Config()):
        for tokens in config.lengths:
            text, name, asked = recall.texts(config, tokens, 3, torch.Generator().manual_seed(1))
            reach = config.layers * config.window
            for line, who in zip(text, name, strict=True):
                places = (line == recall.FIRST_NAME + who).nonzero().flatten()
                assert places.numel() == 1
                assert int(asked.min() - places[0]) > reach
                assert bool((line[asked] == recall.ASK).all())
                assert int((line == recall.ASK).sum()) == asked.numel()
            assert asked.numel() == 1 or int(asked.diff().abs().min()) > reach
            assert int(asked.max()) == tokens - 1


def test_war_and_peace(tmp_path: Path) -> None:
    example = load("war_and_peace_routing")
    text = tmp_path / "text.txt"
    text.write_bytes(b"All happy families are alike. " * 60)
    results = example.main([str(text), "--smoke", "--steps", "2", "--out", str(tmp_path)])
    assert [r.name for r in results] == ["full", "window", "window + rooms"]
    assert len({r.parameters for r in results}) == 1
    assert all(r.bits < 10 for r in results)
    assert results[1].density < results[2].density < results[0].density == 1
    assert (tmp_path / "bits-per-byte.png").stat().st_size > 1000
