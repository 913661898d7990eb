"""The benchmarks run, store what they measure and tell it as it is. No figure is asserted: a busy machine may be slow."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from farlight.analysis import memory
from farlight.cli import main as farlight
from farlight.kernels import cpu, registry
from farlight.patterns import window
from suite import scaling
from suite.allocator import kept_memory
from suite.breakeven import first_win
from suite.contenders import refusal, sparse
from suite.fresh import FreshError, fresh_rows
from suite.memory import extra_memory
from suite.sections import SECTIONS, sections_of
from suite.settings import FULL, QUICK, TINY, Box, Settings
from suite.timing import Contender, interleaved

CPU_SECTIONS = sections_of("cpu")


# The section of a whole Llama takes as long as all others together.
@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x == "llama" else x for x in CPU_SECTIONS])
def test_every_section_measures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Processes of their own are tested below; here their work is done in this one, to save the time of importing torch.
    monkeypatch.setattr(scaling, "fresh_rows", lambda target, given, limit: scaling.long_rows(**given))
    rows = list(SECTIONS[name].rows(TINY, Box(600.0)))
    json.dumps(rows, allow_nan=False)
    assert any("skipped" not in row for row in rows)
    assert [row for row in rows if "error" in row] == []
    for row in rows:
        if "seconds" in row and "low" in row:
            assert 0 < row["low"] <= row["seconds"] <= row["high"]


def test_freed_memory_stays_while_it_is_to_be_kept() -> None:
    def resident() -> int:
        return memory._status("VmRSS") or 0

    if not resident():
        pytest.skip("no /proc here")
    with kept_memory() as granted:
        if not granted:
            pytest.skip("this C library cannot be told to keep memory")
        before = resident()
        torch.ones(2**24)
        held = resident() - before
    assert held > 60 * 2**20
    assert resident() - before < 8 * 2**20


@pytest.mark.parametrize("name", CPU_SECTIONS)
def test_a_section_without_time_says_so(name: str) -> None:
    rows = list(SECTIONS[name].rows(TINY, Box(0.0)))
    # Contenders that are all overhead are measured all the same; they take no time.
    timed = [row for row in rows if row.get("measure") != "call overhead"]
    refused = [row for row in timed if "less is left of" in row.get("skipped", "")]
    assert refused
    assert name == "headline" or all("skipped" in row for row in timed)


@pytest.mark.parametrize(("device", "minutes"), [("cpu", 58), ("cuda", 8)])
def test_the_sections_of_a_device_keep_to_their_time(device: str, minutes: int) -> None:
    assert sum(section.seconds for section in sections_of(device).values()) <= minutes * 60


def test_contenders_are_timed_in_turn() -> None:
    calls: list[str] = []
    sides = [Contender(name, lambda name=name: calls.append(name), loops=1) for name in "AB"]
    sides.append(Contender("once", lambda: calls.append("once"), most=1, warm=False, loops=1))
    timings = interleaved(sides, repeats=3)
    assert calls == ["A", "B", "A", "B", "once", "A", "B", "A", "B"]
    assert {name: timing.repeats for name, timing in timings.items()} == {"A": 3, "B": 3, "once": 1}
    assert timings["A"].first is not None
    assert timings["once"].first is None


def test_what_is_short_is_called_once_more_before_it_is_timed() -> None:
    calls: list[str] = []
    sides = [Contender(name, lambda name=name: calls.append(name), most=most) for name, most in (("A", 2), ("B", 1))]
    interleaved(sides, repeats=1)
    assert calls == ["A", "B", "A", "A", "B", "B"]


def test_a_contender_that_fails_is_reported_and_the_others_go_on() -> None:
    def fail() -> None:
        raise NotImplementedError("not on this machine")

    timings = interleaved([Contender("good", lambda: None), Contender("bad", fail)], repeats=2)
    assert timings["bad"].row() == {"error": "NotImplementedError: not on this machine"}
    assert timings["good"].repeats == 2


def test_repeats_end_with_the_budget_but_each_side_is_timed() -> None:
    timings = interleaved([Contender(name, lambda: None) for name in "AB"], repeats=50, budget=0.0)
    assert [timing.repeats for timing in timings.values()] == [1, 1]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({128: 2.0, 256: 3.0}, 128),
        ({128: 0.5, 256: 1.0}, 256),
        ({128: 1.5, 256: 0.9, 512: 2.0}, 512),
        ({128: 0.5}, None),
        ({}, None),
    ],
)
def test_break_even_is_where_winning_starts_to_last(ratios: dict[int, float], expected: int | None) -> None:
    assert first_win(ratios) == expected


def test_backends_and_their_reasons_are_the_dispatchers() -> None:
    assert set(sparse()) == set(registry.plan_backends())
    for backend in sparse():
        assert refusal(backend, window(4), 64, 1, 8, torch.float32, False) is None or backend != "torch"
    assert refusal("cpu", window(4), 64, 1, 8, torch.float64, False)


def test_settings_survive_json() -> None:
    for settings in (FULL, QUICK, TINY):
        assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_memory_of_a_call() -> None:
    arguments: dict[str, Any] = {"pattern": window(4).to_json(), "tokens": 64, "heads": 1, "head_dim": 8, "dtype": "float32"}
    for contender, grads in (("dense SDPA", False), ("farlight torch", True)):
        (row,) = extra_memory(contender, **arguments, grads=grads, calls=1)
        assert row["extra_memory"] >= 0
        assert row["extra_memory_first"] >= 0


@pytest.mark.slow
def test_a_process_that_fails_says_how() -> None:
    with pytest.raises(FreshError, match=r"no_such: exit status 1: AttributeError: .*no_such"):
        list(fresh_rows("suite.memory:no_such", {}))


def test_a_process_that_hangs_is_stopped() -> None:
    with pytest.raises(FreshError, match="was stopped after 0 s"):
        list(fresh_rows("suite.sections:run_section", {}, limit=0.01))


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            farlight(["bench", *words])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    small = ("--tokens", "64", "--heads", "2", "--head-dim", "8", "--seconds", "0")
    code, out, _ = run("window(4)", "causal() & window(4)", "--tokens", "96", *small, "--backward", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [(row["pattern"], row["tokens"]) for row in rows] == [
        (pattern, n) for pattern in ("window(4)", "causal() & window(4)") for n in (96, 64)
    ]
    assert [row["causal"] for row in rows] == [False, False, True, True]
    assert all(row["seconds"] > 0 and row["full_seconds"] > 0 for row in rows)
    code, out, _ = run("window(4)", *small, "--backend", "torch")
    assert code == 0
    assert "torch" in out
    for words, message in (
        (("window(",), "cannot read the pattern"),
        (("--tokens", "0"), "--tokens 0: it must be at least 1"),
        (("--dtype", "int8"), "--dtype 'int8' is unknown"),
    ):
        code, _, err = run(*words)
        assert code == 2
        assert message in err


def test_results_are_stored_row_by_row(tmp_path: Path) -> None:
    from suite.store import Results

    path, machine = tmp_path / "deep" / "results.json", {"processor": "P", "threads": 2}
    settings = {"name": "full", "dims": (32, 64)}  # a tuple, which JSON gives back as a list
    results = Results(path, machine, settings)
    results.begin("waste", "How?", 1.0)
    results.add("waste", {"about": {"load": 0.5}})
    results.add("waste", {"pattern": "star()", "waste": 1.0})
    killed = json.loads(path.read_text())["sections"]["waste"]
    assert killed["rows"] == [{"pattern": "star()", "waste": 1.0}]
    assert (killed["load"], killed["complete"]) == (0.5, False)
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.add("waste", {"seconds": float("nan")})
    again = Results(path, machine, settings)
    again.begin("dims", "D?", 1.0)
    again.end("dims")
    assert set(json.loads(path.read_text())["sections"]) == {"waste", "dims"}
    other = Results(path, {**machine, "threads": 1}, settings)
    other.write()
    assert json.loads(path.read_text())["sections"] == {}


def test_run_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import report
    import run

    path = tmp_path / "tiny.json"
    assert run.main(["--tiny", "--only", "waste", "--out", str(path)]) == 0
    section = json.loads(path.read_text())["sections"]["waste"]
    assert section["complete"]
    assert section["ceilings"]["copy_gbs"] > 0
    assert cpu.unavailable() is not None or section["ceilings"]["fma_float32_gflops"] > 1
    assert report.main([str(path), "--out", str(tmp_path / "page.md"), "--images", str(tmp_path / "img")]) == 0
    assert "| `bigbird(64, 3)` |" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_sections_of_a_gpu_under_the_interpreter(tmp_path: Path) -> None:
    import report
    import run

    path = tmp_path / "gpu.json"
    assert run.main(["--device", "cuda", "--tiny", "--out", str(path)]) == 0
    sections = json.loads(path.read_text())["sections"]
    assert set(sections) == set(sections_of("cuda"))
    assert all(section["complete"] for section in sections.values())
    parity = [row for row in sections["gpu-parity"]["rows"] if "cases" in row]
    assert all(row["agree"] == row["cases"] > 0 for row in parity)
    assert report.main([str(path), "--out", str(tmp_path / "page.md"), "--images", str(tmp_path / "img")]) == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| determinism |" in page
    assert "FAILED" not in page
    assert "- Longformer(512) + 64 global, 160 tokens: FlexAttention: RuntimeError: a rehearsal compiles nothing" in page
    assert page.count("| `32 clusters` | 160 |") == 3
    assert page.count("| `TopBlocks(count=10, block=16)` | 160 |") == 2


def test_without_a_gpu_its_sections_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    import run

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run.main(["--device", "cuda"]) == 3
    assert "sees no GPU" in capsys.readouterr().err


def synthetic() -> dict[str, Any]:
    """Results such as a run would store, with figures that cannot be mistaken for measured ones."""
    forward = {"tokens": 16384, "dtype": "float32", "pass": "forward"}
    timed = {"low": 0.2, "high": 0.2, "repeats": 3}

    def section(*rows: dict[str, Any], complete: bool = True) -> dict[str, Any]:
        return {
            "question": "Why?",
            "complete": complete,
            "seconds": 1.0,
            "started": "now",
            "ceilings": {"copy_gbs": 11.0},
            "rows": rows,
        }

    headline = [
        {"contender": "matmul", **forward, "seconds": 0.1, **timed, "gflops": 100.0, "of_matmul": 1.0},
        {
            "contender": "dense SDPA",
            **forward,
            "seconds": 7.0,
            **timed,
            "useful_gflops": 5.0,
            "of_matmul": 0.05,
            "times_dense": 1.0,
        },
        {
            "contender": "farlight cpu",
            **forward,
            "seconds": 0.2,
            **timed,
            "useful_gflops": 111.0,
            "of_matmul": 1.11,
            "times_dense": 35.0,
        }
        | {"extra_memory": 0.0125, "extra_memory_first": 0.5},
        {
            "contender": "farlight torch",
            **forward,
            "seconds": 9.0,
            **timed,
            "useful_gflops": 4.0,
            "of_matmul": 0.04,
            "times_dense": 0.7,
        },
        {"contender": "FlexAttention, compiled", **forward, "seconds": 0.8, **timed, "useful_gflops": 30.0, "of_matmul": 0.3}
        | {"mask_seconds": 9.0, "first_seconds": 31.0},
        {"contender": "FlexAttention, compiled", **forward, "pass": "forward + backward", "error": "no backward | on CPU"},
    ]
    length = [
        {"backend": "cpu", **forward, "tokens": 1024, "seconds": 0.04, **timed, "useful_gflops": 90.0}
        | {"dense_seconds": 0.02, "dense_predicted": False, "times_dense": 0.5},
        {"backend": "cpu", **forward, "tokens": 4096, "seconds": 0.16, **timed, "useful_gflops": 90.0}
        | {"dense_seconds": 0.32, "dense_predicted": True, "dense_from": 1024, "times_dense": 2.0},
        {**forward, "tokens": 1048576, "skipped": "needs 13.2 GiB"},
    ]
    patterns = [
        {
            "pattern": name,
            **forward,
            "backend": "cpu",
            "seconds": 0.2,
            **timed,
            "density": 0.03,
            "waste": 1.1,
            "plan_seconds": 0.1,
        }
        | {"useful_gflops": 100.0 * kept, "of_matmul": kept, "rate_of_window": kept, "time_of_window": 1.3}
        for name, kept in (("window(256)", 1.0), ("window(256) | random_keys(3)", 0.85))
    ]
    breakeven = {"pattern": "star()", "dtype": "float32", "pass": "forward", "against": "dense SDPA", "backend": "cpu"}
    breakeven |= {"breakeven": 512, "times_dense": {"128": 0.25, "512": 4.0}}
    call = {"measure": "call overhead", "contender": "farlight cpu", "tokens": 128, "heads": 1, "dtype": "float32"}
    call |= {"seconds": 1e-4, **timed, "us": 100.0, "sdpa_us": 20.0, "over_sdpa_us": 80.0}
    model = {
        "measure": "layer",
        "model": "BigBird",
        "tokens": 4096,
        "dtype": "float32",
        "backend": "cpu",
        "seconds": 0.1,
        **timed,
        "module_seconds": 1.0,
    }
    model |= {"projection_seconds": 0.1, "theirs_seconds": 0.9, "dense_seconds": 0.4, "times_theirs": 9.0, "times_dense": 4.0}
    return {
        "format": 1,
        "machine": {"processor": "Abacus", "threads": 2, "instructions": "beads"},
        "settings": FULL.to_dict(),
        "written": "now",
        "sections": {
            "headline": section(*headline),
            "length": section(*length),
            "patterns": section(*patterns),
            "models": section(model),
            "scaling": section(call),
            "breakeven": section(breakeven),
            "planning": section(complete=False),
        },
    }


def test_the_report_tells_wins_losses_and_gaps(tmp_path: Path) -> None:
    import report

    path = tmp_path / "results.json"
    path.write_text(json.dumps(synthetic()))
    assert report.main([str(path), "--out", str(tmp_path / "page.md"), "--images", str(tmp_path / "img")]) == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    parts = dict(part.split("\n", 1) for part in page.split("\n## ")[1:] if not part.startswith("Why?"))
    assert "| processor | Abacus |" in parts["Machine"]
    wins, losses = parts["Where it wins"], parts["Where it loses"]
    assert "float32 forward at 16,384 tokens: farlight cpu 0.2 s, dense SDPA 7 s: **35 × as fast**." in wins
    assert "farlight cpu 0.2 s, FlexAttention, compiled 0.8 s: **4.00 × as fast**." in wins
    assert "farlight cpu 0.16 s, dense SDPA ≈ 0.32 s (predicted): **2.00 × as fast**." in wins
    assert "Hugging Face's attention 0.9 s: **9.00 × as fast**." in wins
    assert "farlight torch 9 s, dense SDPA 7 s: **0.78 × as fast**." in losses
    assert "float32 forward at 1,024 tokens: farlight cpu 40 ms, dense SDPA 20 ms: **0.50 × as fast**." in losses
    assert "takes 80 µs more than dense SDPA's 20 µs" in losses
    assert "at 128 tokens, backend cpu: 1 of 1 patterns lose to dense attention: `star()` 0.25 ×." in losses
    assert "keeps only a part of the plain window's useful rate: 0.85 in f32 forward" in losses
    assert "35 ×" not in losses
    assert "| µs of a call on 128 tokens over SDPA's | ≤ 60 | 80 (f32) | **not met** |" in parts["Aims"]
    assert "| times as fast as FlexAttention, float32 | ≥ 3 | 4 (f32 forward) | met |" in parts["Aims"]
    assert "beaten from about 2,048 tokens on (1,024 loses, 4,096 wins)" in page
    assert "building its mask took 9 s and its first call, which compiles, 31 s" in page
    gaps = parts["Not measured"]
    assert "no backward | on CPU" in gaps
    assert "length: 1048576 forward f32: needs 13.2 GiB" in gaps
    assert "section planning: the run ended before it was complete" in gaps
    assert {image.name for image in (tmp_path / "img").iterdir()} == {
        "bench-headline.svg",
        "bench-length.svg",
        "bench-patterns.svg",
    }
    assert "](img/bench-length.svg)" in page


def test_every_machine_has_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import report

    monkeypatch.setattr(report, "ROOT", tmp_path)
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for name, day in (("abacus", "2026-01-02"), ("soroban", "2026-01-03"), ("slide-rule", "2026-01-01")):
        results = synthetic()
        results["machine"] |= {"processor": name}
        for section in results["sections"].values():
            section["started"] = f"{day}T00:00:00+00:00"
        (folder / f"{name}.json").write_text(json.dumps(results))
    assert report.main(["--out", str(tmp_path / "docs" / "speed.md"), "--images", str(tmp_path / "docs" / "img")]) == 0
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "docs").glob("*.md")}
    assert set(pages) == {"speed.md", "speed-abacus.md", "speed-slide-rule.md"}
    assert "| processor | soroban |" in pages["speed.md"]
    assert "](speed-abacus.md); [slide-rule (beads), 2 threads](" in pages["speed.md"]
    assert "](img/bench-length.svg)" in pages["speed.md"]
    assert "| processor | abacus |" in pages["speed-abacus.md"]
    assert "[soroban (beads), 2 threads](speed.md)" in pages["speed-abacus.md"]
    assert "](img/abacus/bench-length.svg)" in pages["speed-abacus.md"]


def test_the_report_asks_for_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import report

    monkeypatch.setattr(report, "ROOT", Path("/nonexistent"))
    assert report.main([]) == 2
    assert "measure first: python benchmarks/run.py" in capsys.readouterr().err
